"""The chunk loop: what it multiplies, and what it may not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from held import (
    COMBINATIONS,
    IDS,
    TEACHERS,
    WEIGHTS,
    generator,
    gradients,
    in_dtype,
    leaf,
    leaves,
    make,
    mapped,
)
from precision import (
    BACKENDS,
    DIVERGENCES,
)

from bench.formulas import assert_as_precise, logits_in_torch
from sadkern import Projection, TopK, projection, span_kl, topk_logprobs
from sadkern.backends import native


@pytest.mark.parametrize(("student", "teacher"), COMBINATIONS[1:])
def test_chunks_change_nothing(student, teacher):
    s, t = make(student, IDS.shape, 50, generator(1)), make(teacher, IDS.shape, 50, generator(2))
    results = []
    for chunk_rows in (1, 2, 5, 100, None):
        x = leaf(s)
        out = span_kl(x, t, IDS, divergence="jsd", chunk_rows=chunk_rows)
        out.loss.backward()
        results.append((out.per_token, out.loss, out.teacher_entropy, out.agreement, *gradients(x)))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("student", "teacher"), COMBINATIONS)
def test_parts_of_a_batch_add_up_to_it(student, teacher):
    """With `num_tokens` the counts of the whole batch."""
    s, t = make(student, IDS.shape, 50, generator(1)), make(teacher, IDS.shape, 50, generator(2))
    whole, parts = leaf(s), leaf(s)
    span_kl(whole, t, IDS, token_weights=WEIGHTS).loss.backward()
    counts = [(IDS == 1).sum(), (IDS == 2).sum()]

    def rows(side, i):
        if isinstance(side, TopK):
            return TopK(*(x[i : i + 1] for x in vars(side).values()))
        if isinstance(side, torch.Tensor):
            return side[i : i + 1]
        return Projection(side.hidden[i : i + 1], side.weight, side.bias, side.scale, side.softcap)

    for i in range(len(IDS)):
        part = span_kl(
            rows(parts, i), rows(t, i), IDS[i : i + 1], num_tokens=torch.stack(counts),
            token_weights=WEIGHTS[i : i + 1],
        )  # fmt: skip
        part.loss.backward()
    for got, expected in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_projection_says_what_its_logits_say():
    """Values and diagnostics, of both sides, against the logits that PyTorch makes."""
    s, t = make("projection", IDS.shape, 50, generator(1)), make("projection", IDS.shape, 50,
                                                                 generator(2), width=3)  # fmt: skip
    for name, (divergence, mix) in DIVERGENCES.items():
        options = {"divergence": divergence, "beta": mix, "skew": mix, "span_weights": (1.0, 0.5)}
        got = span_kl(s, t, IDS, **options)
        expected = span_kl(logits_in_torch(s), logits_in_torch(t), IDS, **options)
        for field, value in vars(expected).items():
            torch.testing.assert_close(
                getattr(got, field), value, rtol=1e-5, atol=1e-6, msg=f"{name}: {field}"
            )


@pytest.mark.parametrize("train", ["hidden", "weight", "bias"])
def test_only_what_requires_a_gradient_gets_one(train):
    """A frozen head (LoRA), or nothing but the head."""
    s, t = make("projection", IDS.shape, 50, generator(1)), make("projection", IDS.shape, 50,
                                                                 generator(2))  # fmt: skip
    everything = leaf(s)
    span_kl(everything, t, IDS).loss.backward()
    alone = mapped(s, torch.clone)
    getattr(alone, train).requires_grad_()
    span_kl(alone, t, IDS).loss.backward()
    for name in ("hidden", "weight", "bias"):
        grad = getattr(alone, name).grad
        assert (grad is not None) == (name == train)
    assert torch.equal(getattr(alone, train).grad, getattr(everything, train).grad)


def count_products(run):
    """Matrix products in `run`."""
    with torch.profiler.profile() as profile:
        run()
    products = ("aten::addmm", "aten::addmm_", "aten::mm", "aten::matmul", "aten::bmm")
    return sum(event.count for event in profile.key_averages() if event.key in products)


def test_four_products_a_chunk_and_none_in_backward():
    s, t = make("projection", IDS.shape, 50, generator(1)), make("projection", IDS.shape, 50,
                                                                 generator(2))  # fmt: skip
    supervised = int((IDS != 0).sum())
    x = leaf(s)
    losses = []
    chunks = -(-supervised // 4)
    assert (
        count_products(lambda: losses.append(span_kl(x, t, IDS, chunk_rows=4).loss)) == 4 * chunks
    )
    assert count_products(losses[0].backward) == 0
    # Without the weight's gradient there are three, without any two; a top-k needs no teacher's.
    x.weight.requires_grad_(False)
    assert count_products(lambda: span_kl(x, t, IDS, chunk_rows=4)) == 3 * chunks
    assert count_products(lambda: span_kl(s, t, IDS, chunk_rows=4)) == 2 * chunks
    topk = topk_logprobs(t, 5)
    assert count_products(lambda: span_kl(s, topk, IDS, chunk_rows=4)) == chunks


def test_tiles_are_supervised_rows_in_memory_that_is_reused(monkeypatch):
    seen = []
    original = native.divergence_rows

    def spy(student, teacher, *arguments, **options):
        seen.append((student.data_ptr(), teacher.data_ptr(), student.shape, student.dtype))
        return original(student, teacher, *arguments, **options)

    monkeypatch.setattr(native, "divergence_rows", spy)
    s, t = make("projection", IDS.shape, 50, generator(1)), make("projection", IDS.shape, 50,
                                                                 generator(2))  # fmt: skip
    s, t = in_dtype(s, torch.bfloat16), in_dtype(t, torch.bfloat16)
    span_kl(leaf(s), t, IDS, chunk_rows=4, backend="native").loss.backward()
    assert len({(mine, other) for mine, other, _, _ in seen}) == 1
    assert sum(shape[0] for _, _, shape, _ in seen) == (IDS != 0).sum()
    assert all(shape[0] <= 4 and dtype is torch.float32 for _, _, shape, dtype in seen)


@pytest.mark.parametrize(
    ("vocab", "sides", "rows"), [(32000, 2, 819), (151936, 2, 819), (32000, 1, 9)]
)
def test_both_tiles_fit_the_budget_by_default(vocab, sides, rows):
    parts = []
    for chunk, tiles, gradient in projection.chunks(
        native, torch.arange(rows), vocab, sides, torch.float32, None, 64 << 20, torch.float32
    ):
        parts.append(len(chunk))
        assert tiles.shape == (sides, len(chunk), vocab)
        assert gradient.data_ptr() == tiles.data_ptr()
        assert sides * tiles.stride(0 if sides > 1 else 1) * 4 <= 64 << 20
    assert sum(parts) == rows
    assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_what_is_not_supervised_is_not_looked_at(teacher, backend):
    s, t = (
        make("projection", IDS.shape, 50, generator(1)),
        make(teacher, IDS.shape, 50, generator(2)),
    )
    clean = leaf(s)
    span_kl(clean, t, IDS, backend=backend).loss.backward()
    dirty = Projection(s.hidden.masked_fill((IDS == 0)[..., None], torch.nan), s.weight, s.bias,
                       s.scale, s.softcap)  # fmt: skip
    dirty = leaf(dirty)
    span_kl(dirty, t, IDS, backend=backend).loss.backward()
    for got, expected in zip(gradients(dirty), gradients(clean), strict=True):
        assert torch.equal(got, expected)
    assert not clean.hidden.grad[IDS == 0].any()


@pytest.mark.parametrize(("student", "teacher"), COMBINATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_supervised_gives_zeros(student, teacher, backend):
    s = leaf(make(student, IDS.shape, 50, generator(1)))
    out = span_kl(
        s, make(teacher, IDS.shape, 50, generator(2)), torch.zeros_like(IDS), backend=backend
    )
    out.loss.backward()
    assert out.loss == 0
    assert not out.per_token.any()
    for gradient in gradients(s):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("student", "teacher"), COMBINATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_row_needs_no_leading_dimension(student, teacher, backend):
    s, t = make(student, (), 50, generator(1)), make(teacher, (), 50, generator(2))
    ids = torch.tensor(1)

    def one_row(side):
        if isinstance(side, TopK):
            return TopK(*(x[None] for x in vars(side).values()))
        if isinstance(side, torch.Tensor):
            return side[None]
        return Projection(side.hidden[None], side.weight, side.bias, side.scale, side.softcap)

    got = leaf(s)
    out = span_kl(got, t, ids, backend=backend)
    out.loss.backward()
    expected = leaf(one_row(s))
    loss = span_kl(expected, one_row(t), ids[None], backend=backend).loss
    loss.backward()
    assert out.per_token.shape == ()
    assert torch.equal(out.loss, loss)
    for mine, other in zip(gradients(got), gradients(expected), strict=True):
        assert torch.equal(mine, other.view_as(mine))


@pytest.mark.parametrize(("student", "teacher"), COMBINATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_different_vocabularies_are_compared_over_their_common_prefix(student, teacher, backend):
    """The rest of either is -inf and not 0, and the student's own rest gets no gradient."""
    widths = [(50, 50)] if teacher == "topk" else [(50, 64), (64, 50)]
    for mine, theirs in widths:
        s = leaf(make(student, IDS.shape, mine, generator(1)))
        t = make(teacher, IDS.shape, theirs, generator(2))
        out = span_kl(s, t, IDS, backend=backend)
        out.loss.backward()
        cut = t if teacher == "topk" else logits_in_torch(t)[..., :50]
        expected = span_kl(logits_in_torch(s).detach()[..., :50], cut, IDS)
        torch.testing.assert_close(out.per_token, expected.per_token, rtol=1e-5, atol=1e-6)
        of_vocab = [s.grad.movedim(-1, 0)] if student == "logits" else [s.weight.grad, s.bias.grad]
        for gradient in of_vocab:
            assert not gradient[50:].any()
            assert gradient[:50].any()


@pytest.mark.parametrize(("student", "teacher"), COMBINATIONS[1:])
def test_a_row_index_from_the_collator_is_taken(student, teacher):
    s, t = make(student, IDS.shape, 50, generator(1)), make(teacher, IDS.shape, 50, generator(2))
    rows = IDS.flatten().nonzero().squeeze(-1)
    got, expected = leaf(s), leaf(s)
    span_kl(got, t, IDS, rows=rows).loss.backward()
    span_kl(expected, t, IDS).loss.backward()
    for mine, other in zip(gradients(got), gradients(expected), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(ValueError, match="rows has 10 indices that are not those of the 11"):
        span_kl(s, t, IDS, rows=rows[1:])


def test_tied_embeddings_get_both_gradients():
    embedding = torch.randn(30, 8, generator=generator(1), dtype=torch.float64)
    tokens = torch.randint(0, 30, IDS.shape, generator=generator(2))
    teacher = torch.randn(*IDS.shape, 30, generator=generator(3), dtype=torch.float64)

    def gradient(dtype, loss):
        weight = embedding.to(dtype, copy=True).requires_grad_()
        loss(torch.tanh(weight[tokens]), weight, teacher.to(dtype)).backward()
        return weight.grad

    def fused(hidden, weight, t):
        return span_kl(Projection(hidden, weight), t, IDS, reduction="token_mean").loss

    def eager(hidden, weight, t):
        logq = F.log_softmax(hidden @ weight.t(), -1)[IDS != 0]
        return F.kl_div(
            logq, F.log_softmax(t, -1)[IDS != 0], reduction="batchmean", log_target=True
        )

    assert_as_precise(
        gradient(torch.float32, fused), gradient(torch.float64, eager),
        gradient(torch.float32, eager), torch.float32,
    )  # fmt: skip


def test_hidden_states_and_weight_may_differ_in_dtype():
    """As under autocast, or with a head kept in fp32."""
    s = make("projection", IDS.shape, 50, generator(1), width=16)
    t = make("projection", IDS.shape, 50, generator(2))
    mixed = leaf(Projection(s.hidden.bfloat16(), s.weight, s.bias.bfloat16(), s.scale, s.softcap))
    span_kl(mixed, t, IDS).loss.backward()
    exact = leaf(mixed, torch.float64)
    span_kl(exact, in_dtype(t, torch.float64), IDS).loss.backward()
    for got, expected in zip(gradients(mixed), gradients(exact), strict=True):
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=2 * eps, atol=2e-6)
    assert [x.grad.dtype for x in leaves(mixed)] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_autocast_does_not_round_the_tiles():
    s, t = make("projection", IDS.shape, 50, generator(1)), make("projection", IDS.shape, 50,
                                                                 generator(2))  # fmt: skip
    plain, cast = leaf(s), leaf(s)
    span_kl(plain, t, IDS).loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        span_kl(cast, t, IDS).loss.backward()
    for got, expected in zip(gradients(cast), gradients(plain), strict=True):
        assert torch.equal(got, expected)


def test_a_weight_that_is_a_slice_or_transposed_is_read_as_it_is():
    s, t = (
        make("projection", IDS.shape, 50, generator(1)),
        make("logits", IDS.shape, 50, generator(2)),
    )
    expected, got = leaf(s), leaf(s)
    span_kl(expected, t, IDS).loss.backward()
    weight = got.weight.detach().t().contiguous().t().requires_grad_()
    hidden = torch.cat([got.hidden.detach(), got.hidden.detach()], -1).requires_grad_()
    wide = torch.cat([t, t], -1)
    span_kl(
        Projection(hidden[..., :6], weight, got.bias, s.scale, s.softcap), wide[..., :50], IDS
    ).loss.backward()
    torch.testing.assert_close(weight.grad, expected.weight.grad)
    torch.testing.assert_close(hidden.grad[..., :6], expected.hidden.grad)
    assert not hidden.grad[..., 6:].any()


def test_logits_of_any_layout_meet_a_projection():
    """Rows of a longer sequence, as `logits[:, :-1]`, and the gradient in place."""
    t = make("projection", IDS.shape, 50, generator(2))
    long = make("logits", (3, 6), 50, generator(1))
    expected = leaf(long[:, :-1].contiguous())
    span_kl(expected, t, IDS, chunk_rows=4).loss.backward()
    got = leaf(long)
    span_kl(got[:, :-1], t, IDS, chunk_rows=4).loss.backward()
    assert torch.equal(got.grad[:, :-1], expected.grad)
    for inplace in (leaf(long) * 1.0, (leaf(long) * 1.0).bfloat16()):
        loss = span_kl(inplace[:, :-1], t, IDS, inplace=True, chunk_rows=4).loss
        eps = torch.finfo(inplace.dtype).eps
        torch.testing.assert_close(
            inplace.detach()[:, :-1].float(), expected.grad, rtol=4 * eps, atol=4 * eps
        )
        assert loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_gradient_filter_leaves_out_is_within_its_bound(dtype):
    """A student near a peaked teacher: most of the vocabulary has next to no gradient."""
    vocab, eps = 2000, 1e-3
    t = make("projection", IDS.shape, vocab, generator(1), width=24, softcap=None)
    t = in_dtype(Projection(t.hidden * 4, t.weight, t.bias, t.scale), dtype)
    noise = torch.randn(*IDS.shape, 24, generator=generator(2))
    s = Projection((t.hidden + 0.3 * noise).to(dtype), t.weight, t.bias, t.scale)
    options = {"chunk_rows": 4, "token_weights": WEIGHTS, "reduction": "sum"}
    results = []
    for filter_eps in (None, eps, 0.0):
        x = leaf(s)
        span_kl(x, t, IDS, grad_filter_eps=filter_eps, **options).loss.backward()
        results.append([gradient.double() for gradient in gradients(x)])
    full, filtered, nothing_left_out = results
    for got, expected in zip(nothing_left_out, full, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)

    weight = s.weight.double().norm(dim=-1)
    hidden = s.hidden.double().norm(dim=-1)[IDS != 0]
    rounding = 2 * torch.finfo(dtype).eps
    bound = eps * WEIGHTS.max() * s.scale
    dhidden = (filtered[0] - full[0]).norm(dim=-1) - rounding * full[0].norm(dim=-1)
    assert (dhidden <= bound * weight.sum()).all()
    dweight = (filtered[1] - full[1]).norm(dim=-1) - rounding * full[1].norm(dim=-1)
    assert (dweight <= bound * hidden.sum() + 1e-6).all()
    left_out = ~filtered[1].any(-1)
    assert left_out.double().mean() > 0.5
    assert torch.equal(filtered[2], full[2])  # a bias costs nothing


def test_the_gradient_filter_keeps_nan():
    t = make("projection", IDS.shape, 500, generator(1))
    s = leaf(Projection(t.hidden.clone(), t.weight, t.bias, t.scale, t.softcap))
    s.hidden.data[0, 0] = torch.nan
    span_kl(s, t, IDS, grad_filter_eps=1.0).loss.backward()
    assert s.hidden.grad[0, 0].isnan().all()
    assert s.weight.grad.isnan().all()
