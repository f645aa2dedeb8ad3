"""The operators under torch's own machinery: opcheck, compile, checkpointing, autograd."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from held import COMBINATIONS, generator, make
from torch.utils.checkpoint import checkpoint

from sadkern import Projection, ops, sides, span_kl

IDS = torch.tensor([[1, 1, 0, 2], [2, 0, 1, 0]])

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a compiler"
)


def logits(dtype=torch.float32, vocab=37):
    generator = torch.Generator().manual_seed(7)
    student = torch.randn(*IDS.shape, vocab, generator=generator).to(dtype)
    teacher = torch.randn(*IDS.shape, vocab, generator=generator).to(dtype)
    return student, teacher


def held(kind, seed):
    """A side of each kind, as users hold it, for IDS and a vocabulary of 37."""
    return make(kind, IDS.shape, 37, generator(seed), width=5 + seed, k=8)


def operator_arguments(student="logits", teacher="logits", with_gradient=True, **changes):
    student_kind, tensors, numbers = sides.pack(held(student, 1))
    teacher_kind, teacher_tensors, teacher_numbers = sides.pack(held(teacher, 2))
    given = {
        "student_kind": student_kind,
        "student": tensors,
        "student_numbers": numbers,
        "backend": "native",
        "with_gradient": [with_gradient] * len(tensors),
        "teacher_kind": teacher_kind,
        "teacher": teacher_tensors,
        "teacher_numbers": teacher_numbers,
        "span_ids": IDS,
        "rows": IDS.flatten().nonzero().squeeze(-1),
        "token_weights": torch.rand(IDS.shape),
        "labels": torch.randint(0, 37, IDS.shape),
        "num_tokens": torch.tensor([3.0, 5.0], dtype=torch.float64),
        "span_weights": [1.0, 0.5],
        "divergence": "jsd",
        "mix": 0.3,
        "temperature": 1.5,
        "reduction": "span_mean",
        "ce_weight": 0.2,
        "tail": "bucket",
        "chunk_rows": 2,
        "grad_filter_eps": 1e-3,
        "group": None,
    }
    return given | changes


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("student", "teacher"), COMBINATIONS)
def test_opcheck_span_kl(student, teacher, with_gradient, backend):
    torch.library.opcheck(
        torch.ops.sadkern.span_kl.default,
        kwargs=operator_arguments(student, teacher, with_gradient, backend=backend),
        args=(),
    )


@pytest.mark.parametrize("teacher", ["logits", "projection", "topk"])
def test_opcheck_span_kl_inplace(teacher):
    given = operator_arguments("logits", teacher)
    for name in ("student_kind", "student_numbers", "with_gradient"):
        del given[name]
    (given["student"],) = given["student"]
    torch.library.opcheck(torch.ops.sadkern.span_kl_.default, args=(), kwargs=given)


@pytest.mark.parametrize("source", ["logits", "projection"])
def test_opcheck_topk(source):
    packed = sides.pack(held(source, 1))
    torch.library.opcheck(torch.ops.sadkern.topk.default, (*packed, 8, 1.5, 3, "native"))
    torch.library.opcheck(torch.ops.sadkern.sample.default, (*packed, 8, 1.5, 7, 3))


def test_opcheck_with_gradient():
    inputs = [torch.randn(3, 4, requires_grad=True), torch.randn(2, requires_grad=True)]
    gradients = [torch.randn(3, 4), torch.randn(2)]
    torch.library.opcheck(
        torch.ops.sadkern.with_gradient.default, (torch.tensor(2.0), inputs, gradients, "auto")
    )


def test_opcheck_scale():
    torch.library.opcheck(
        torch.ops.sadkern.scale_.default, (torch.randn(5), torch.tensor(0.5), "auto")
    )


def training_step(student, teacher, labels, **options):
    hidden = student * 1.25
    out = span_kl(hidden, teacher, IDS, labels=labels, ce_weight=0.3, **options)
    return out.loss * 2, out.span_loss, out.teacher_entropy


@needs_compiler
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_compiled_without_graph_break_gives_the_same(inplace, divergence):
    student, teacher = logits()
    labels = torch.randint(0, 37, IDS.shape)
    results = []
    for function in (training_step, torch.compile(training_step, fullgraph=True)):
        leaf = student.clone().requires_grad_()
        loss, span_loss, entropy = function(
            leaf, teacher, labels, divergence=divergence, inplace=inplace
        )
        loss.backward()
        results.append((loss, span_loss, entropy, leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


@needs_compiler
@pytest.mark.parametrize(("student", "teacher"), COMBINATIONS)
def test_every_combination_compiles_to_the_same(student, teacher):
    held_teacher = held(teacher, 2)

    def step(*tensors):
        side = tensors[0] if len(tensors) == 1 else Projection(*tensors, 1.3, 4.0)
        out = span_kl(side, held_teacher, IDS, tail="renormalize")
        return out.loss * 2, out.per_token, out.tail_mass

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        tensors = [x.requires_grad_() for x in sides.tensors_of(held(student, 1)).values()]
        loss, *rest = function(*tensors)
        loss.backward()
        results.append((loss, *rest, *(x.grad for x in tensors)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


def test_checks_on_values_also_speak_when_compiled():
    student, teacher = logits()
    compiled = torch.compile(lambda s, t, ids: span_kl(s, t, ids).loss, fullgraph=True)
    with pytest.raises(ValueError, match=r"span_ids\[1, 2\] is 3, expected 0 to 2"):
        compiled(
            student,
            teacher,
            IDS.clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(3)),
        )


def test_checkpointing_recomputes_the_same_gradient():
    student, teacher = logits()
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        leaf = student.clone().requires_grad_()
        wrap(lambda s: span_kl(s * 2, teacher, IDS).loss, leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_autocast_leaves_the_dtype_of_the_logits_and_sums_in_fp32():
    student, teacher = logits()
    weight = torch.randn(37, 37, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = student @ weight
        out = span_kl(low, teacher.bfloat16(), IDS)
    assert low.dtype is torch.bfloat16
    assert out.loss.dtype is torch.float32
    expected = span_kl(low.detach().double(), teacher.bfloat16().double(), IDS).loss
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    out.loss.backward()
    assert weight.grad.abs().sum() > 0


def test_the_gradient_is_scaled_by_what_comes_from_above():
    student, teacher = logits()
    leaf = student.clone().requires_grad_()
    (span_kl(leaf, teacher, IDS).loss * -3.5).backward()
    plain = student.clone().requires_grad_()
    span_kl(plain, teacher, IDS).loss.backward()
    torch.testing.assert_close(leaf.grad, -3.5 * plain.grad)


def test_a_retained_graph_can_be_walked_again():
    student, teacher = logits()
    leaf = student.clone().requires_grad_()
    loss = span_kl(leaf, teacher, IDS).loss * 3
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss, leaf)[0]
    assert torch.equal(first, kept)
    assert torch.equal(first, second)


def test_gradients_accumulate_over_calls():
    student, teacher = logits()
    once = student.clone().requires_grad_()
    span_kl(once, teacher, IDS).loss.backward()
    twice = student.clone().requires_grad_()
    for _ in range(2):
        span_kl(twice, teacher, IDS).loss.backward()
    torch.testing.assert_close(twice.grad, 2 * once.grad)


def test_a_second_derivative_is_refused():
    student, teacher = logits()
    leaf = student.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(span_kl(leaf, teacher, IDS).loss, leaf, create_graph=True)


def test_without_gradient_none_is_computed():
    student, teacher = logits()
    assert not span_kl(student, teacher, IDS).loss.requires_grad
    with torch.no_grad():
        assert not span_kl(student.requires_grad_(), teacher, IDS).loss.requires_grad
    *_, gradients = ops.span_kl(**operator_arguments(with_gradient=False))
    assert [gradient.numel() for gradient in gradients] == [0]


def test_only_the_loss_carries_a_gradient():
    student, teacher = logits()
    out = span_kl(student.requires_grad_(), teacher, IDS)
    carrying = [name for name, value in vars(out).items() if value.requires_grad]
    assert carrying == ["loss"]


def test_inplace_bumps_the_version_so_that_autograd_notices():
    student, teacher = logits()
    leaf = student.clone().requires_grad_()
    produced = leaf.exp()  # exp's backward needs its output
    version = produced._version
    out = span_kl(produced, teacher, IDS, inplace=True)
    assert produced._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_inplace_leaves_the_gradient_in_the_logits():
    student, teacher = logits()
    leaf = student.clone().requires_grad_()
    produced = leaf * 1.0
    loss = span_kl(produced, teacher, IDS, inplace=True).loss
    out_of_place = student.clone().requires_grad_()
    span_kl(out_of_place, teacher, IDS).loss.backward()
    assert torch.equal(produced.detach(), out_of_place.grad)
    loss.backward()
    assert torch.equal(leaf.grad, out_of_place.grad)
