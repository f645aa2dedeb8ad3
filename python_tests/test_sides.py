"""Six combinations of what a user holds, against float64 autograd; any call, the reference."""

from __future__ import annotations

import pytest
import torch
from held import (
    COMBINATIONS,
    IDS,
    STUDENTS,
    TEACHERS,
    generator,
    gradients,
    in_dtype,
    leaf,
    make,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import check_gradients
from precision import (
    BACKENDS,
    DIVERGENCES,
    PAIRS,
)

from bench.formulas import logits_in_torch
from sadkern import Projection, span_kl


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("student", "teacher"), COMBINATIONS)
def test_gradients_of_every_combination(student, teacher, name, backend):
    for softcap in (4.0, None):
        s = make(student, IDS.shape, 41, generator(1), softcap=softcap)
        t = make(teacher, IDS.shape, 41, generator(2), width=9, softcap=softcap)
        for temperature in (1.0, 1.7):
            check_gradients(s, t, name, temperature=temperature, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "tail"),
    [(name, tail) for name, tail in PAIRS if tail != "bucket"],
)
@pytest.mark.parametrize("student", STUDENTS)
def test_gradients_of_every_tail(student, name, tail, backend):
    s = make(student, IDS.shape, 41, generator(1))
    check_gradients(s, make("topk", IDS.shape, 41, generator(2)), name, tail=tail, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_gradients_of_half_precision(name, teacher, dtype):
    s = make("projection", IDS.shape, 300, generator(1), width=32, dtype=dtype)
    t = make(teacher, IDS.shape, 300, generator(2), width=48, dtype=dtype)
    check_gradients(s, t, name)


@pytest.fixture
def products_in_bf16():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_torchs_own_switch_for_products_keeps_the_precision_of_bf16(name, products_in_bf16):
    """Of bf16 weights and hidden states they are then as exact, and faster where there is AMX."""
    s = make("projection", IDS.shape, 300, generator(1), width=32, dtype=torch.bfloat16)
    t = make("projection", IDS.shape, 300, generator(2), width=48, dtype=torch.bfloat16)
    check_gradients(s, t, name)


def test_logits_of_half_precision_weights_are_not_rounded():
    """q - p cancels: with logits rounded to bf16 the gradient of a converged student is noise."""
    t = make("projection", IDS.shape, 300, generator(1), width=32, softcap=None)
    t = in_dtype(t, torch.bfloat16)
    near = t.hidden + 0.01 * torch.randn(*IDS.shape, 32, generator=generator(2))
    s = Projection(near.bfloat16(), t.weight, t.bias, t.scale)

    def gradient(student, teacher):
        student = leaf(student)
        span_kl(student, teacher, IDS, backend="auto").loss.backward()
        return student.hidden.grad.double()

    exact = gradient(in_dtype(s, torch.float64), in_dtype(t, torch.float64))
    error = (gradient(s, t) - exact).norm() / exact.norm()
    logits = leaf(logits_in_torch(leaf(s)).detach())
    span_kl(logits, logits_in_torch(t), IDS).loss.backward()
    rounded = s.scale * logits.grad.double() @ s.weight.double()
    assert error < 0.005  # bf16's own rounding of the result
    assert (rounded - exact).norm() / exact.norm() > 10 * error


# Of what is summed up over vocabulary and rows, at most. (PyTorch's own error, the measure of the
# precision rule, may be none by chance where there is but a row.)
ROUNDINGS = 20


@st.composite
def calls(draw):
    """Any call: shapes, spans, kinds, dtypes, K, tails, settings."""
    rows = (draw(st.integers(1, 3)), draw(st.integers(1, 5)))
    vocab = draw(st.integers(2, 70))
    kinds = draw(st.sampled_from(COMBINATIONS))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = generator(draw(st.integers(0, 2**31)))
    softcap = draw(st.sampled_from([None, 3.0]))
    k = draw(st.integers(1, vocab))
    student = make(
        kinds[0], rows, vocab, seed, width=draw(st.integers(1, 9)), softcap=softcap, dtype=dtype
    )
    teacher = make(kinds[1], rows, vocab, seed, width=draw(st.integers(1, 9)), k=k, dtype=dtype)
    name = draw(st.sampled_from(list(DIVERGENCES)))
    options = {
        "divergence": DIVERGENCES[name][0],
        "beta": DIVERGENCES[name][1],
        "tail": draw(st.sampled_from(["bucket", "renormalize", "none"])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 2.0])),
        "reduction": draw(st.sampled_from(["span_mean", "token_mean", "sum"])),
        "chunk_rows": draw(st.sampled_from([None, 1, 3])),
        "span_weights": (1.0, 0.5, 2.0),
    }
    if name == "reverse_kl" and options["tail"] == "renormalize":
        options["tail"] = "bucket"
    ids = torch.randint(0, 4, rows, generator=seed)
    return student, teacher, ids, options


@settings(max_examples=300, deadline=None)
@given(calls())
def test_any_call_agrees_with_the_reference_in_float64(call):
    student, teacher, ids, options = call
    got = leaf(student)
    out = span_kl(got, teacher, ids, backend="native", **options)
    out.loss.backward()
    exact = leaf(student, torch.float64)
    truth = span_kl(exact, in_dtype(teacher, torch.float64), ids, backend="reference", **options)
    truth.loss.backward()
    eps = ROUNDINGS * torch.finfo(torch.float32).eps
    for field in ("loss", "span_loss", "per_token", "teacher_entropy", "tail_mass"):
        torch.testing.assert_close(
            getattr(out, field).double(), getattr(truth, field), rtol=eps, atol=eps
        )
    assert torch.equal(out.span_count, truth.span_count)
    if options["tail"] != "none":
        assert (out.per_token >= 0).all()
    for mine, expected in zip(gradients(got), gradients(exact), strict=True):
        eps = torch.finfo(mine.dtype).eps
        atol = eps * max(1.0, expected.abs().max().item())
        if mine.dtype is torch.float32:
            atol *= ROUNDINGS
        torch.testing.assert_close(mine.double(), expected, rtol=2 * eps, atol=atol)
