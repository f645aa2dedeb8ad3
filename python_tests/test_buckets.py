"""The divergence to a top-k teacher: over its tokens and a bucket of all others."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from held import likely
from precision import (
    BACKENDS,
    CASES,
    DIVERGENCES,
    HALVES,
    PAIRS,
    logits,
    ours,
    plain,
)

from bench.formulas import assert_as_precise, coarse_in_torch, divergence_of_logs
from sadkern import TopK, span_kl, topk_logprobs
from sadkern.span_kl import TAILS


def coarse_kl(student, teacher, name, tail):
    """(value [N], gradient [N, V]) of what one would write, in at least fp32."""
    divergence, mix = DIVERGENCES[name]
    wide = torch.promote_types(student.dtype, torch.float32)
    leaf = student.detach().to(wide).requires_grad_()
    value = divergence_of_logs(
        *coarse_in_torch(leaf.log_softmax(-1), teacher, tail), divergence, mix
    )
    value.sum().backward()
    return value.detach(), leaf.grad


# What the divergence is.


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_form_of_three_tokens(backend):
    """p = (1/2, tail 1/2), q = (1/4, 1/4, 1/2): buckets (1/2, 1/2) and (1/4, 3/4)."""
    s = torch.tensor([[0.0, 0.0, math.log(2.0)]], requires_grad=True)
    teacher = TopK(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]))
    ids = torch.tensor([1])
    out = span_kl(s, teacher, ids, reduction="sum", backend=backend)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert out.per_token.item() == pytest.approx(expected, abs=1e-7)
    assert out.tail_mass.item() == pytest.approx(0.5, abs=1e-7)
    assert out.teacher_entropy.item() == pytest.approx(math.log(2), abs=1e-6)
    assert out.agreement.tolist() == [False]
    out.loss.backward()
    # q - p inside, q (1 - p_tail / q_tail) outside
    assert s.grad[0].tolist() == pytest.approx([-0.25, 0.25 / 3, 0.5 / 3], abs=1e-7)

    # All of the mass on token 0: -log q_0, and q - 1 or q.
    s.grad = None
    out = span_kl(s, teacher, ids, reduction="sum", backend=backend, tail="renormalize")
    assert out.per_token.item() == pytest.approx(math.log(4), abs=1e-6)
    out.loss.backward()
    assert s.grad[0].tolist() == pytest.approx([-0.75, 0.25, 0.5], abs=1e-7)

    # Half of it, and nothing of the rest.
    s.grad = None
    out = span_kl(s, teacher, ids, reduction="sum", backend=backend, tail="none")
    assert out.per_token.item() == pytest.approx(0.5 * math.log(2), abs=1e-6)
    out.loss.backward()
    assert s.grad[0].tolist() == pytest.approx([-0.375, 0.125, 0.25], abs=1e-7)


@pytest.mark.parametrize(("name", "tail"), PAIRS)
def test_reference_gradient_is_the_derivative_of_its_value(name, tail):
    divergence, mix = DIVERGENCES[name]
    s, t = logits("random", 9, torch.float64, rows=3)
    lp, ids = t.log_softmax(-1).topk(4, -1)
    teacher = TopK(ids, lp)

    def value(x):
        return span_kl(
            x, teacher, torch.tensor([1, 2, 1]), divergence=divergence, beta=mix, skew=mix,
            temperature=1.7, labels=torch.tensor([2, -100, 0]), ce_weight=0.3, tail=tail,
        ).loss  # fmt: skip

    torch.autograd.gradcheck(value, s.requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_tokens_and_bucket_is_the_full_divergence(name, backend):
    s, t = logits("random", 60, torch.float32, rows=8)
    got = ours(s, topk_logprobs(t, 60), *DIVERGENCES[name], backend)
    exact = ours(s.double(), t.double(), *DIVERGENCES[name], "reference")
    for values in zip(got, exact, plain(s, t, *DIVERGENCES[name]), strict=True):
        assert_as_precise(*values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_more_tokens_only_add_to_the_bucketed_divergence(name, backend):
    """A coarser pair of distributions is closer: 0 <= D_1 <= D_4 <= .. <= D."""
    for case in ("random", "near", "saturated", "opposed"):
        s, t = logits(case, 200, torch.float32, rows=4)
        values = [
            ours(s, topk_logprobs(t, k), *DIVERGENCES[name], backend)[0] for k in (1, 4, 16, 64)
        ]
        values.append(ours(s, t, *DIVERGENCES[name], backend)[0])
        assert (values[0] >= 0).all()
        for coarse, fine in itertools.pairwise(values):
            assert (coarse <= fine * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "tail"), PAIRS)
def test_equal_sides_have_no_divergence_over_buckets(name, tail, backend):
    s, _ = logits("random", 300, torch.float32, rows=8)
    value, gradient = ours(s, topk_logprobs(s, 20), *DIVERGENCES[name], backend, tail=tail)
    if tail == "bucket":
        assert (value >= 0).all()
        assert (value < 2e-6).all()
        # Where p = q nothing but rounding tells the side of tvd's kink.
        assert name == "tvd" or (gradient.abs() < 1e-6).all()
    elif tail == "none" and name != "tvd":
        # Every given token has q = p: its term is 0, and forward KL still moves mass to it.
        assert (value.abs() < 2e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_tail_of_1e_7_keeps_its_digits(name, backend):
    """The student is certain of the teacher's tokens: 1 - sum q would leave its tail one digit."""
    generator = torch.Generator().manual_seed(3)
    s = torch.randn(16, 500, generator=generator)
    s[:, :4] += 23
    t = torch.randn(16, 500, generator=generator)
    t[:, :4] += 8
    teacher = likely(t, 4)
    q_tail = s.double().softmax(-1).scatter(-1, teacher.ids.long(), 0).sum(-1)
    assert (q_tail < 1e-7).all()
    value, gradient = ours(s, teacher, *DIVERGENCES[name], backend)
    exact, exact_gradient = coarse_kl(s.double(), teacher, name, "bucket")
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=1e-12)
    outside = torch.ones_like(s, dtype=torch.bool).scatter(-1, teacher.ids.long(), False)
    torch.testing.assert_close(
        gradient.double()[outside], exact_gradient[outside], rtol=1e-5, atol=1e-14
    )


# The kernel against float64, on each instruction set.


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "tail"), PAIRS)
def test_precision(name, tail, case, dtype, isa):
    for vocab, k in ((2, 1), (5, 5), (37, 3), (4099, 40)):
        s, t = logits(case, vocab, dtype)
        teacher = likely(t, k)
        got = ours(s, teacher, *DIVERGENCES[name], "native", tail=tail)
        exact = ours(s.double(), teacher, *DIVERGENCES[name], "reference", tail=tail)
        torchs = ours(s, teacher, *DIVERGENCES[name], "reference", tail=tail)
        assert_as_precise(got[0], exact[0], torchs[0], torch.float32)
        if name == "tvd" and case == "huge":
            continue  # p = q = 1/2 up to rounding: at its kink
        finite = exact[0].isfinite()  # reverse KL to a tail whose mass is 0 in fp32 is not
        assert_as_precise(*(x[1][finite] for x in (got, exact, torchs)), dtype)


@pytest.mark.parametrize(("name", "tail"), PAIRS)
def test_reference_equals_what_one_would_write(name, tail):
    s, t = logits("random", 60, torch.float64)
    teacher = likely(t, 7)
    for got, expected in zip(
        ours(s, teacher, *DIVERGENCES[name], "reference", tail=tail),
        coarse_kl(s, teacher, name, tail),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vocab", [50257, 151936])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_precision_of_real_vocabularies(name, vocab):
    for case in ("random", "near"):
        s, t = logits(case, vocab, torch.float32, rows=2)
        teacher = topk_logprobs(t, 64)
        value, gradient = ours(s, teacher, *DIVERGENCES[name], "native")
        exact, exact_gradient = coarse_kl(s.double(), teacher, name, "bucket")
        plain, plain_gradient = coarse_kl(s, teacher, name, "bucket")
        assert_as_precise(value, exact, plain, torch.float32)
        assert_as_precise(gradient, exact_gradient, plain_gradient, torch.float32)


# What must not matter. (The reference sums in the inputs' precision: there, in float64.)


def of(backend, teacher, *tensors):
    """`teacher` and `tensors` as precise as the backend's sums need."""
    if backend != "reference":
        return teacher, *tensors
    doubled = (x.double() if x is not None and x.is_floating_point() else x
               for x in vars(teacher).values())  # fmt: skip
    return TopK(*doubled), *(x.double() for x in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "tail"), PAIRS)
def test_order_of_entries_and_of_the_vocabulary(name, tail, backend):
    s, t = logits("random", 5003, torch.float32, rows=4)
    teacher, s = of(backend, topk_logprobs(t, 30), s)
    value, gradient = ours(s, teacher, *DIVERGENCES[name], backend, tail=tail)
    order = torch.randperm(30)
    swapped = TopK(teacher.ids[:, order], teacher.logprobs[:, order], teacher.tail_mass)
    moved = ours(s, swapped, *DIVERGENCES[name], backend, tail=tail)
    torch.testing.assert_close(moved[0], value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved[1], gradient, rtol=1e-5, atol=1e-8)
    place = torch.randperm(5003)
    renamed = TopK(place.argsort()[teacher.ids.long()], teacher.logprobs, teacher.tail_mass)
    moved = ours(s[:, place], renamed, *DIVERGENCES[name], backend, tail=tail)
    torch.testing.assert_close(moved[0], value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved[1], gradient[:, place], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "tail"), PAIRS)
def test_an_entry_without_id_is_none(name, tail, backend):
    s, t = logits("random", 100, torch.float32, rows=8)
    teacher, s = of(backend, topk_logprobs(t, 6), s)
    expected = ours(s, teacher, *DIVERGENCES[name], backend, tail=tail)
    nothing = torch.full((8, 2), -1, dtype=torch.int32)
    padded = TopK(
        torch.cat([nothing, teacher.ids, nothing], -1),
        torch.cat([nothing.float(), teacher.logprobs, nothing - torch.inf], -1),
        teacher.tail_mass,
    )
    got = ours(s, padded, *DIVERGENCES[name], backend, tail=tail)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_known_of_the_full_distribution_is_handed_on(backend):
    s, t = logits("random", 100, torch.float32, rows=8)
    ids = torch.ones(8, dtype=torch.long)
    teacher = topk_logprobs(t, 6)
    full = span_kl(s, t, ids, backend=backend)
    got = span_kl(s, teacher, ids, backend=backend)
    torch.testing.assert_close(got.teacher_entropy, full.teacher_entropy, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.agreement, full.agreement)
    outside = t.double().softmax(-1).scatter(-1, teacher.ids.long(), 0).sum(-1)
    torch.testing.assert_close(got.tail_mass.double(), outside, rtol=1e-5, atol=1e-9)
    # Without that knowledge: what is missing, and the entropy of the buckets, which is less.
    bare = span_kl(s, TopK(teacher.ids, teacher.logprobs), ids, backend=backend)
    torch.testing.assert_close(bare.tail_mass.double(), outside, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bare.per_token, got.per_token, rtol=1e-4, atol=1e-5)
    p = torch.cat([teacher.logprobs.exp(), outside[:, None].float()], -1)
    torch.testing.assert_close(bare.teacher_entropy, -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-5)
    assert (bare.teacher_entropy <= full.teacher_entropy + 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_tokens_among_the_entries(backend):
    """Fewer tokens than K are allowed: the other entries have probability 0, as has the tail."""
    s, t = logits("random", 40, torch.float32, rows=8)
    banned = torch.arange(40) >= 5
    s, t = s.masked_fill(banned, -torch.inf), t.masked_fill(banned, -torch.inf)
    teacher = topk_logprobs(t, 8)
    assert not teacher.tail_mass.any()
    for name in DIVERGENCES:
        got = ours(s, teacher, *DIVERGENCES[name], backend)
        full = ours(s, t, *DIVERGENCES[name], backend)
        torch.testing.assert_close(got[0], full[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], full[1], rtol=1e-5, atol=1e-6)
        # Rounding alone must not make a tail that the student lacks.
        bare = ours(s, TopK(teacher.ids, teacher.logprobs), *DIVERGENCES[name], backend)
        torch.testing.assert_close(bare[0], full[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_without_a_tail_is_infinitely_far_from_a_teacher_with_one(backend):
    s, t = logits("random", 40, torch.float32, rows=2)
    teacher = topk_logprobs(t, 3)
    known = torch.zeros(40, dtype=torch.bool).scatter(0, teacher.ids[0].long(), True)
    s[0] = s[0].masked_fill(~known, -torch.inf)
    value, gradient = ours(s, teacher, "forward_kl", 0.0, backend)
    assert value[0] == torch.inf
    assert value[1].isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_comes_out_as_nan_in_its_row_alone(backend, tail, side):
    s, t = logits("random", 4099, torch.float32, rows=3)
    teacher = likely(t, 5)
    if side == "student":
        s[1, 77] = torch.nan
    else:
        teacher.logprobs[1, 2] = torch.nan
    for name in DIVERGENCES:
        if (name, tail) not in PAIRS:
            continue
        value, gradient = ours(s, teacher, *DIVERGENCES[name], backend, tail=tail)
        assert value.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_of_any_layout_and_the_gradient_in_place(inplace):
    s = torch.randn(3, 6, 5000)
    teacher = topk_logprobs(torch.randn(3, 5, 5000), 9)
    ids = torch.tensor([[1, 0, 2, 1, 1]] * 3)
    expected = s[:, :-1].clone().requires_grad_()
    span_kl(expected, teacher, ids).loss.backward()
    leaf = s.clone().requires_grad_()
    span_kl((leaf * 1.0)[:, :-1], teacher, ids, inplace=inplace).loss.backward()
    assert torch.equal(leaf.grad[:, :-1], expected.grad)
    assert not leaf.grad[:, -1].any()


# What is refused.

X = torch.randn(2, 3, 9)
IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_teachers(backend):
    teacher = topk_logprobs(X, 3)

    def call(ids=teacher.ids, logprobs=teacher.logprobs, **options):
        return span_kl(X, TopK(ids, logprobs), IDS, backend=backend, **options)

    wrong = teacher.ids.clone()
    wrong[1, 0, 2] = 9
    with pytest.raises(ValueError, match=r"teacher.ids\[1, 0, 2\] is 9, expected -1 .* or 0 to 8"):
        call(wrong)
    wrong[1, 0, 2] = -2
    with pytest.raises(ValueError, match=r"teacher.ids\[1, 0, 2\] is -2"):
        call(wrong)
    wrong[1, 0] = torch.tensor([4, 1, 4])
    with pytest.raises(ValueError, match=r"teacher.ids\[1, 0\] holds id 4 twice"):
        call(wrong)
    with pytest.raises(
        ValueError, match=r"teacher.ids is torch.float32, expected a Tensor of torch.int32"
    ):
        call(teacher.logprobs)
    with pytest.raises(
        ValueError, match=r"teacher.logprobs has shape \[2, 3, 2\], expected \[2, 3, 3\]"
    ):
        call(logprobs=teacher.logprobs[..., :2])
    with pytest.raises(
        ValueError, match=r"teacher.ids has shape \[1, 3, 3\], expected \[2, 3, 'K'\]"
    ):
        call(teacher.ids[:1], teacher.logprobs[:1])
    with pytest.raises(
        ValueError,
        match=r"teacher.logprobs\[0, 0, 0\] is 0\.[0-9]+, expected at most 0: natural log",
    ):
        call(logprobs=teacher.logprobs.exp())
    assert call(logprobs=teacher.logprobs.exp(), tail="none").loss.isfinite()  # weights
    with pytest.raises(ValueError, match="tail='drop': expected one of bucket, renormalize, none"):
        call(tail="drop")
    with pytest.raises(ValueError, match="reverse_kl with tail='renormalize' is infinite"):
        call(tail="renormalize", divergence="reverse_kl")
    with pytest.raises(ValueError, match=r"teacher.logprobs requires a gradient"):
        call(logprobs=teacher.logprobs.clone().requires_grad_())
    with pytest.raises(ValueError, match="student is a TopK, expected logits"):
        span_kl(teacher, X, IDS)


def test_what_is_not_supervised_may_hold_anything():
    teacher = topk_logprobs(X, 3)
    teacher.ids[0, 1] = 7
    teacher.logprobs[0, 1] = torch.nan
    ids = IDS.clone()
    ids[0, 1] = 0
    assert span_kl(X, teacher, ids).loss.isfinite()
