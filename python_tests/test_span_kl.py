"""The public function: values and gradients by formula, by float64 and by invariance."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import far_rows
from precision import (
    BACKENDS,
    DIVERGENCES,
    HALVES,
    divergence_in_torch,
    logits,
    ours,
    plain,
)

from bench.formulas import assert_as_precise
from sadkern import span_kl
from sadkern.backends import native

# The reference holds the formulas: finite differences and closed forms hold the reference.


@pytest.mark.parametrize("name", DIVERGENCES)
def test_reference_gradient_is_the_derivative_of_its_value(name):
    divergence, mix = DIVERGENCES[name]
    s, t = logits("random", 7, torch.float64, rows=3)
    weights = torch.tensor([[0.5], [2.0], [1.0]], dtype=torch.float64)

    def value(x):
        return span_kl(
            x, t, torch.tensor([1, 2, 1]), divergence=divergence, beta=mix, skew=mix,
            temperature=1.7, token_weights=weights[:, 0], labels=torch.tensor([2, -100, 0]),
            ce_weight=0.3, span_weights=(1.0, 0.25),
        ).loss  # fmt: skip

    torch.autograd.gradcheck(value, s.requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_reference_equals_what_one_would_write(name):
    divergence, mix = DIVERGENCES[name]
    s, t = logits("random", 50, torch.float64)
    for got, expected in zip(
        ours(s, t, divergence, mix, "reference"), plain(s, t, divergence, mix), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms_of_two_tokens(backend):
    """p = (3/4, 1/4), q = (1/2, 1/2)."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    eps = torch.finfo(dtype).eps
    s = torch.tensor([[0.0, 0.0]], dtype=dtype)
    t = torch.tensor([[math.log(3.0), 0.0]], dtype=dtype)
    kl_pq = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    kl_qp = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    m = (0.625, 0.375)
    js = 0.5 * sum(
        a * math.log(a / c) for a, c in ((0.75, m[0]), (0.25, m[1]), (0.5, m[0]), (0.5, m[1]))
    )
    skewed = (0.1 * 0.75 + 0.9 * 0.5, 0.1 * 0.25 + 0.9 * 0.5)
    expected = {
        "forward_kl": (kl_pq, [-0.25, 0.25]),
        "reverse_kl": (kl_qp, [0.5 * (math.log(2 / 3) - kl_qp), 0.5 * (math.log(2) - kl_qp)]),
        "jsd": (js, None),
        "skew_forward_kl": (
            0.75 * math.log(0.75 / skewed[0]) + 0.25 * math.log(0.25 / skewed[1]),
            None,
        ),
        "tvd": (0.25, [-0.25, 0.25]),
    }
    for name, (value, gradient) in expected.items():
        divergence, mix = DIVERGENCES[name]
        got, dlogits = ours(s, t, divergence, mix, backend)
        assert got.item() == pytest.approx(value, abs=eps)
        if gradient:
            assert dlogits[0].tolist() == pytest.approx(gradient, abs=eps)
        assert dlogits.sum().item() == pytest.approx(0, abs=eps)


# Invariances.


@pytest.mark.parametrize("name", DIVERGENCES)
def test_permuting_the_vocabulary_permutes_the_gradient(name):
    s, t = logits("random", 5003, torch.float32, rows=4)
    order = torch.randperm(5003)
    value, gradient = ours(s, t, *DIVERGENCES[name], "native")
    moved, moved_gradient = ours(s[:, order], t[:, order], *DIVERGENCES[name], "native")
    torch.testing.assert_close(moved, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved_gradient, gradient[:, order], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_shifting_a_sides_logits_changes_nothing(name):
    s, t = logits("random", 300, torch.float32)
    # 64 is added without rounding to logits kept to multiples of 2^-10.
    s, t = (s * 1024).round() / 1024, (t * 1024).round() / 1024
    value, gradient = ours(s, t, *DIVERGENCES[name], "native")
    moved, moved_gradient = ours(s + 64, t - 128, *DIVERGENCES[name], "native")
    torch.testing.assert_close(moved, value, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_of_the_vocabulary_is_minus_infinity_and_not_zero(name, backend):
    """As Qwen's: the student's weight has rows for 64 tokens that no tokenizer makes."""
    s, t = logits("random", 200, torch.float32, rows=8)
    value, gradient = ours(s, t, *DIVERGENCES[name], backend)
    wide = torch.nn.functional.pad(s, (0, 64), value=5.0)
    got, dwide = ours(wide, t, *DIVERGENCES[name], backend)
    assert torch.equal(got, value)
    assert torch.equal(dwide[:, :200], gradient)
    assert not dwide[:, 200:].any()
    wide = torch.nn.functional.pad(t, (0, 72), value=5.0)
    got, dlogits = ours(s, wide, *DIVERGENCES[name], backend)
    assert torch.equal(got, value)
    assert torch.equal(dlogits, gradient)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperature_divides_both_sides(name):
    s, t = logits("random", 300, torch.float32)
    value, gradient = ours(s, t, *DIVERGENCES[name], "native", temperature=2.0)
    scaled, scaled_gradient = ours(s / 2, t / 2, *DIVERGENCES[name], "native")
    torch.testing.assert_close(value, scaled, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, scaled_gradient / 2, rtol=1e-5, atol=1e-8)


def test_the_ends_of_beta_and_skew_are_plain_divergences():
    s, t = logits("random", 100, torch.float32)
    forward, reverse = (ours(s, t, name, 0.0, "native") for name in ("forward_kl", "reverse_kl"))
    for name, mix, expected in [
        ("jsd", 0.0, forward),
        ("jsd", 1.0, reverse),
        ("skew_forward_kl", 0.0, forward),
        ("skew_reverse_kl", 0.0, reverse),
    ]:
        for got, plain_kl in zip(ours(s, t, name, mix, "native"), expected, strict=True):
            assert torch.equal(got, plain_kl)
    # At 1 the skewed ones compare a distribution with itself.
    for name in ("skew_forward_kl", "skew_reverse_kl"):
        value, gradient = ours(s, t, name, 1.0, "native")
        assert value.abs().max() < 1e-6
        assert gradient.abs().max() < 1e-6


def test_merging_states_is_associative_and_has_an_identity():
    """The state of a whole is the merge of its parts' states, however they are grouped."""
    merge = native.core().merge_states
    generator = torch.Generator().manual_seed(3)
    s, t = (30 * torch.randn(90, generator=generator, dtype=torch.float64) for _ in range(2))
    s[:5], t[40:45] = -torch.inf, -torch.inf
    temperature = 1.5

    def state(a, b):
        ms, mt = a.max(), b.max()
        xs, xt = a - ms, b - mt
        es, et = xs.exp(), xt.exp()
        parts = [
            ms, es.sum(), mt, et.sum(),
            torch.where(et > 0, et * xt, 0.0).sum(),
            torch.where(et > 0, et * (xt - xs), 0.0).sum(),
            torch.where(es > 0, es * (xs - xt), 0.0).sum(),
            (xs * temperature).exp().sum(),
        ]  # fmt: skip
        return [float(part) for part in parts]

    cuts = [(5, 31), (31, 40), (45, 90)]
    a, b, c = (state(s[i:j], t[i:j]) for i, j in cuts)
    whole = torch.cat([torch.arange(i, j) for i, j in cuts])
    expected = pytest.approx(state(s[whole], t[whole]), rel=1e-12)
    assert merge(merge(a, b, temperature), c, temperature) == expected
    assert merge(a, merge(b, c, temperature), temperature) == expected
    assert merge(c, merge(b, a, temperature), temperature) == expected
    empty = [-math.inf, 0.0, -math.inf, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert merge(a, empty, temperature) == a
    assert merge(empty, a, temperature) == a


# Spans and reductions.


def batch(rows=(3, 5), vocab=64, dtype=torch.float32):
    s, t = logits("random", vocab, dtype, rows=math.prod(rows))
    ids = torch.randint(0, 3, rows, generator=torch.Generator().manual_seed(5))
    return s.view(*rows, vocab), t.view(*rows, vocab), ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["span_mean", "token_mean", "sum"])
def test_reductions_are_equations_4_to_6(backend, reduction):
    s, t, ids = batch()
    rows = divergence_in_torch(s.double(), t.double(), "forward_kl", 0.0)
    sums = torch.stack([rows[ids == kind].sum() for kind in (1, 2)])
    counts = torch.stack([(ids == kind).sum() for kind in (1, 2)])
    normaliser = {"span_mean": counts, "token_mean": counts.sum(), "sum": 1}[reduction]
    out = span_kl(s, t, ids, span_weights=(0.7, 1.9), reduction=reduction, backend=backend)
    assert out.span_count.tolist() == counts.tolist()
    torch.testing.assert_close(out.span_loss.double(), sums / normaliser, rtol=1e-6, atol=0)
    expected = (torch.tensor([0.7, 1.9]) * sums / normaliser).sum()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    supervised = torch.where(ids != 0, rows, 0.0).float()
    torch.testing.assert_close(out.per_token, supervised, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_products_equal_their_definitions(backend):
    s, t, ids = batch()
    s[:2] += t[:2]
    labels = torch.randint(0, 64, ids.shape)
    labels[ids == 1] = -100
    out = span_kl(s, t, ids, labels=labels, ce_weight=0.5, temperature=2.0, backend=backend)
    p = (t.double() / 2).softmax(-1)
    entropy = torch.where(ids != 0, -(p * p.log()).sum(-1), 0.0)
    torch.testing.assert_close(out.teacher_entropy.double(), entropy, rtol=1e-6, atol=1e-7)
    agreement = (s.argmax(-1) == t.argmax(-1)) & (ids != 0)
    assert torch.equal(out.agreement, agreement)
    assert agreement.any()
    assert not agreement[ids != 0].all()
    # Hard labels are at temperature 1, whatever the divergence's is.
    hard = torch.nn.functional.cross_entropy(
        s.view(-1, 64).double(), labels.view(-1), reduction="none"
    )
    hard = torch.where(ids != 0, hard.view(ids.shape), 0.0)
    torch.testing.assert_close(out.cross_entropy.double(), hard, rtol=1e-6, atol=1e-7)
    total = out.per_token.double() + 0.5 * hard
    for kind in (1, 2):
        assert out.span_loss[kind - 1].item() == pytest.approx(
            total[ids == kind].mean().item(), rel=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_hard_labels_in_the_same_pass(name, temperature, dtype, isa):
    divergence, mix = DIVERGENCES[name]
    for vocab in (37, 2048, 5001):
        s, t = logits("random", vocab, dtype, rows=6)
        labels = torch.tensor([0, vocab - 1, -100, vocab // 2, 17, 36])
        options = {"labels": labels, "ce_weight": 0.7, "temperature": temperature}
        _, got = ours(s, t, divergence, mix, "native", **options)
        _, exact = ours(s.double(), t.double(), divergence, mix, "reference", **options)
        leaf = s.clone().requires_grad_()
        soft = divergence_in_torch(leaf / temperature, t / temperature, divergence, mix).sum()
        hard = torch.nn.functional.cross_entropy(leaf, labels, reduction="sum")
        (soft + 0.7 * hard).backward()
        assert_as_precise(got, exact, leaf.grad, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_weights_multiply_rows(backend):
    s, t, ids = batch()
    weights = torch.rand(ids.shape)
    weighted = s.clone().requires_grad_()
    span_kl(weighted, t, ids, token_weights=weights, backend=backend).loss.backward()
    flat = s.clone().requires_grad_()
    out = span_kl(flat, t, ids, backend=backend)
    out.loss.backward()
    torch.testing.assert_close(weighted.grad, flat.grad * weights[..., None], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_batches_with_num_tokens_add_up_to_the_whole(backend):
    s, t, ids = batch(rows=(4, 6))
    whole = s.clone().requires_grad_()
    span_kl(whole, t, ids, backend=backend).loss.backward()
    counts = torch.stack([(ids == kind).sum() for kind in (1, 2)])
    parts = s.clone().requires_grad_()
    for i in range(4):
        span_kl(parts[i], t[i], ids[i], num_tokens=counts, backend=backend).loss.backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-10)
    total = sum(
        span_kl(
            s[i],
            t[i],
            ids[i],
            num_tokens=int(counts.sum()),
            reduction="token_mean",
            backend=backend,
        ).loss
        for i in range(4)
    )
    expected = span_kl(s, t, ids, reduction="token_mean", backend=backend).loss
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_spans_than_two(backend):
    s, t, _ = batch()
    ids = torch.arange(15).view(3, 5) % 5
    out = span_kl(s, t, ids, span_weights=(1.0, 0.0, 2.0, 0.5), backend=backend)
    rows = divergence_in_torch(s.double(), t.double(), "forward_kl", 0.0)
    means = [rows[ids == kind].mean().item() for kind in range(1, 5)]
    assert out.span_loss.tolist() == pytest.approx(means, rel=1e-6)
    assert out.loss.item() == pytest.approx(means[0] + 2 * means[2] + 0.5 * means[3], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0,), (2, 0), ()])
def test_an_empty_mask_gives_zero(backend, shape):
    vocab = 20
    s = torch.randn(*shape, vocab, requires_grad=True)
    out = span_kl(
        s, torch.randn(*shape, vocab), torch.zeros(shape, dtype=torch.long), backend=backend
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.span_loss.tolist() == [0, 0]
    assert torch.equal(s.grad, torch.zeros_like(s))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_span_contributes_nothing(backend):
    s, t, ids = batch()
    ids[ids == 2] = 0
    out = span_kl(s, t, ids, backend=backend)
    assert out.span_loss[1].item() == 0
    assert out.loss.item() == out.span_loss[0].item() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsupervised_rows_are_neither_read_nor_given_a_gradient(backend, dtype):
    s, t, ids = batch(dtype=dtype)
    expected = span_kl(s, t, ids, backend=backend).loss
    s[ids == 0], t[ids == 0] = torch.nan, torch.inf
    leaf = s.clone().requires_grad_()
    out = span_kl(leaf, t, ids, backend=backend)
    out.loss.backward()
    assert torch.equal(out.loss, expected)
    assert not leaf.grad[ids == 0].any()
    assert leaf.grad[ids != 0].isfinite().all()
    assert not out.teacher_entropy[ids == 0].any()


# Layouts.


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "odd offset", "strided entries", "5d"])
def test_any_layout_gives_the_same(layout, dtype, inplace):
    s, t, ids = batch(rows=(4, 6), vocab=67, dtype=dtype)
    views = {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda x: torch.cat([x, x], 1)[:, :6],
        "odd offset": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
        "strided entries": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "5d": lambda x: x.view(2, 1, 2, 6, 67),
    }
    view = views[layout]
    shape = (2, 1, 2, 6) if layout == "5d" else (4, 6)
    plain_leaf = s.clone().requires_grad_()
    expected = span_kl(plain_leaf, t, ids)
    expected.loss.backward()
    leaf = s.clone().requires_grad_()
    out = span_kl(view(leaf) * 1, view(t), ids.view(shape), inplace=inplace)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(leaf.grad, plain_leaf.grad)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_gives_the_same_gradient(name, dtype):
    divergence, mix = DIVERGENCES[name]
    for vocab in (5, 2048, 5001):
        s, t = logits("random", vocab, dtype, rows=3)
        labels = torch.tensor([1, 4, -100])
        leaf = s.clone().requires_grad_()
        options = {"divergence": divergence, "beta": mix, "skew": mix, "labels": labels}
        ids = torch.tensor([1, 2, 1])
        span_kl(leaf, t, ids, ce_weight=0.5, **options).loss.backward()
        over = s.clone().requires_grad_()
        span_kl(over * 1, t, ids, ce_weight=0.5, inplace=True, **options).loss.backward()
        assert torch.equal(over.grad, leaf.grad)


def test_rows_beyond_two_to_the_31st_entry():
    far_rows("native")


def test_large_gradients_come_from_recycled_memory_and_are_written_whole():
    """8 MiB of gradient twice over: the second stands where the first was."""
    s, t = logits("random", 32003, torch.float32, rows=64)
    ids = torch.arange(64) % 3
    places = []
    for _ in range(2):
        leaf = s.clone().requires_grad_()
        span_kl(leaf, t, ids, backend="native").loss.backward()
        places.append(leaf.grad.data_ptr())
        assert not leaf.grad[ids == 0].any()
        assert leaf.grad.isfinite().all()
        again = leaf.grad.clone()
        del leaf
    assert places[0] == places[1]
    exact = ours(s.double(), t.double(), "forward_kl", 0.0, "reference")[1]
    member = torch.where(
        ids == 1, 1 / (ids == 1).sum(), torch.where(ids == 2, 1 / (ids == 2).sum(), 0)
    )
    torch.testing.assert_close(again, (exact * member[:, None]).float(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(threads):
    s, t = logits("random", 3001, torch.float32, rows=40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = ours(s, t, "jsd", 0.5, "native")
    finally:
        torch.set_num_threads(before)
    for mine, expected in zip(got, ours(s, t, "jsd", 0.5, "native"), strict=True):
        assert torch.equal(mine, expected)
