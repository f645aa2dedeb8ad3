"""The Triton kernels against float64, every way they go about rows, under Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from held import likely
from kernel_checks import (
    LAYOUTS,
    any_layout,
    check_selection,
    check_ties,
    everything_at_once,
    far_rows,
    launched_where_tensors_are,
    precision_of_logits,
)
from precision import (
    CASES,
    DIVERGENCES,
    HALVES,
    PAIRS,
    logits,
    ours,
)

from bench.formulas import assert_as_precise
from bench.traffic import counted
from sadkern import backends, span_kl, topk_logprobs
from sadkern.backends import triton as backend
from sadkern.backends.triton import divergence as of
from sadkern.backends.triton import plans
from sadkern.backends.triton import row as rows

FP32, BF16, FP16 = torch.float32, *HALVES
# (V, dtype, most bytes of a row that are kept), in tiles of 128 entries, so that there are several,
# whole ones and ragged ones. An odd V cannot be packed.
WAYS = {
    "kept, packed, bf16": (300, BF16, 1 << 20),
    "kept, packed, fp16": (260, FP16, 1 << 20),
    "kept, bf16": (257, BF16, 1 << 20),
    "kept, fp32": (37, FP32, 1 << 20),
    "swept, bf16": (256, BF16, 0),
    "swept, fp16": (133, FP16, 0),
    "swept, fp32": (301, FP32, 0),
}

# Every dtype, kept and swept, packed and not.
TYPICAL = ("kept, packed, bf16", "swept, fp16", "swept, fp32")


def ways_and_cases(everywhere, typically):
    """Each case of `everywhere` in all ways, each of `typically` in the typical ones: a sweep's
    arithmetic does not know how it came by a tile."""
    pairs = [(way, case) for case in everywhere for way in WAYS]
    pairs += [(way, case) for case in typically for way in TYPICAL if case not in everywhere]
    return pytest.mark.parametrize(("way", "case"), pairs, indirect=["way"])


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """V and a dtype, in each way."""
    vocab, dtype, kept = WAYS[request.param]
    small = {key: choice._replace(tile=128, group=2) for key, choice in plans.SM_80.items()}
    monkeypatch.setitem(plans.TABLES, plans.OLDEST, small)
    monkeypatch.setattr(plans, "ON_CHIP", dict.fromkeys(plans.ON_CHIP, kept))
    return vocab, dtype


@pytest.fixture
def triton_backend():
    return backends.backend("triton")


def test_ways_are_what_they_say(way, request):
    vocab, dtype = way
    name = request.node.callspec.params["way"]
    plan = plans.choose("state", plans.OLDEST, vocab, torch.empty(2, vocab, dtype=dtype))
    group = 2 if vocab > 128 else 1
    tiles = group * -(-vocab // (128 * group)) if name.startswith("kept") else 0
    assert plan[:2] == (128, tiles)
    assert plan.PACKED is ("packed" in name)


@ways_and_cases(["random", "banned"], CASES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_precision_of_logits(name, case, way):
    precision_of_logits("triton", name, case, *way)


@ways_and_cases(["banned"], ["near", "opposed"])
@pytest.mark.parametrize(("name", "tail"), PAIRS)
def test_precision_of_buckets(name, tail, case, way):
    # Reverse KL is the largest, and errs by a rounding of it: that of many rows is compared.
    s, t = logits(case, *way, rows=16 if name == "reverse_kl" else 6)
    teacher = likely(t, 17)
    got = ours(s, teacher, *DIVERGENCES[name], "triton", tail=tail)
    exact = ours(s.double(), teacher, *DIVERGENCES[name], "reference", tail=tail)
    torchs = ours(s, teacher, *DIVERGENCES[name], "reference", tail=tail)
    assert_as_precise(got[0], exact[0], torchs[0], torch.float32)
    finite = exact[0].isfinite()
    assert_as_precise(*(x[1][finite] for x in (got, exact, torchs)), s.dtype)


@ways_and_cases(["random", "banned"], ["near", "huge", "far", "saturated"])
def test_selection_and_its_sums(case, way):
    vocab, dtype = way
    x, _ = logits(case, vocab, dtype, rows=8)
    for k in (1, min(vocab, 100)):
        check_selection(x, k, topk_logprobs(x, k, backend="triton"))


@pytest.mark.parametrize("k", [3, 64])
def test_more_that_reach_the_bound_than_are_ranked(k, way):
    """Ties, and rows whose largest stand in the same places of all tiles: found by bisection."""
    vocab, dtype = way
    columns = torch.arange(vocab)
    x = torch.stack([
        torch.zeros(vocab),
        torch.full((vocab,), -torch.inf).masked_fill(columns == vocab - 1, 1.0),
        torch.where(columns % 128 < 3, 5.0 + columns / 999, columns / 999),
        -(columns % 7) / 1.0,
    ]).to(dtype)  # fmt: skip
    k = min(k, vocab)
    check_ties(x, k, topk_logprobs(x, k, backend="triton"))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("teacher", ["logits", "topk"])
def test_labels_temperature_weights_and_padding(teacher, inplace, way):
    everything_at_once("triton", *way, teacher, inplace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same(layout, dtype):
    any_layout("triton", layout, dtype)


@pytest.mark.parametrize("dtype", [FP32, *HALVES])
@pytest.mark.parametrize("shape", [(5000,), (3, 129), (2, 3, 64), (0, 7)])
def test_scaled_gradient_is_the_rounded_product(shape, dtype, triton_backend):
    x = torch.randn(shape).to(dtype)
    for factor in (torch.tensor(0.3), torch.tensor(-2.5, dtype=torch.bfloat16), torch.tensor(0.0)):
        got = x.clone()
        triton_backend.scale_(got, factor)
        # (The interpreter cuts bf16 off, where a GPU rounds.)
        rtol = torch.finfo(dtype).eps if dtype is BF16 else 0
        torch.testing.assert_close(got, (x.float() * factor).to(dtype), rtol=rtol, atol=0)


def test_scaling_leaves_what_lies_between_rows(triton_backend):
    memory = torch.randn(4, 3, 80)
    before = memory.clone()
    triton_backend.scale_(memory[::2, :, 3:70], torch.tensor(4.0))
    inside = torch.zeros_like(memory, dtype=torch.bool)
    inside[::2, :, 3:70] = True
    assert torch.equal(memory, torch.where(inside, 4 * before, before))


def test_scaling_by_one_moves_nothing(triton_backend):
    x = torch.tensor([math.nan, math.inf, -0.0, 1.0]).repeat(2, 1500)
    before = x.view(torch.int32).clone()
    with counted() as found:
        triton_backend.scale_(x, torch.tensor(1.0))
    assert torch.equal(x.view(torch.int32), before)
    assert (found.loaded, found.stored) == (2 * 4, 0)  # the factor, of each row


@pytest.mark.parametrize("teacher", ["logits", "topk"])
@pytest.mark.parametrize("dtype", [FP32, *HALVES])
def test_scaled_loss_scales_its_gradient(teacher, dtype):
    s, t = logits("random", 300, dtype, rows=6)
    ids = torch.tensor([1, 2, 0] * 2)
    side = t if teacher == "logits" else topk_logprobs(t, 5, backend="triton")
    gradients = []
    for factor in (1.0, 3.0):
        leaf = s.clone().requires_grad_()
        (factor * span_kl(leaf, side, ids, backend="triton").loss).backward()
        gradients.append(leaf.grad)
    rtol = torch.finfo(dtype).eps if dtype is BF16 else 0  # cut off, as above
    torch.testing.assert_close(
        gradients[1], (3 * gradients[0].float()).to(dtype), rtol=rtol, atol=0
    )


def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    class Watched:
        def __init__(self, kernel, launching):
            self.kernel, self.launching = kernel, launching

        def __getitem__(self, grid):
            self.launching()
            return self.kernel[grid]

    def watch(launching):
        for module in (backend.span_kl, backend.span_kl_topk, backend.topk, backend.scale):
            monkeypatch.setattr(module, "kernel", Watched(module.kernel, launching))

    assert launched_where_tensors_are("triton", monkeypatch, watch) == 4


def test_rows_beyond_two_to_the_31st_entry():
    far_rows("triton")


@pytest.mark.parametrize(
    ("vocab", "name", "case"),
    [
        (50257, "forward_kl", "random"),
        (50257, "jsd", "near"),
        (151936, "forward_kl", "near"),
        (151936, "jsd", "random"),
    ],
)
def test_precision_of_real_vocabularies(vocab, name, case):
    precision_of_logits("triton", name, case, vocab, BF16, rows=1)


@pytest.mark.parametrize("vocab", [50257, 151936])
def test_selection_from_real_vocabularies(vocab):
    for case in ("random", "near"):
        s, _ = logits(case, vocab, BF16, rows=1)
        check_selection(s, 64, topk_logprobs(s, 64, backend="triton"))


def test_a_state_is_that_of_its_row_however_it_is_cut_into_groups():
    """In every order, with groups that one side bans whole, and with nothing."""
    generator = torch.Generator().manual_seed(3)
    s, t = (30 * torch.randn(4, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    s[0, 8:], t[0, 8:], t[2], s[3] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    t[3] -= 3000  # the weight of what the student bans is 0
    expected = state(s.reshape(-1), t.reshape(-1), 1 / 1.5)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        for group in (1, 2, 4):
            out = torch.empty(10)
            state_kernel[(1,)](
                s[order].float(), t[order].float(), out, 1 / 1.5, group, 4 // group, 16
            )
            torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)


def state(s, t, inv_temperature):
    """The fields of `RowState`, by their definitions."""
    x_s, x_t = s - s.max(), t - t.max()
    e_s, e_t = (x_s * inv_temperature).exp(), (x_t * inv_temperature).exp()
    s_of_top_t, t_of_top_s = s[t == t.max()].max(), t[s == s.max()].max()
    parts = [
        s.max(), e_s.sum(), t.max(), e_t.sum(), torch.where(e_t > 0, e_t * x_t, 0.0).sum(),
        torch.where(e_t > 0, e_t * (x_t - (s - s_of_top_t)), 0.0).sum(),
        torch.where(e_s > 0, e_s * (x_s - (t - t_of_top_s)), 0.0).sum(), x_s.exp().sum(),
        s_of_top_t, t_of_top_s,
    ]  # fmt: skip
    return torch.stack(parts).float()


@triton.jit
def state_kernel(s, t, out, inv_temperature, GROUP: tl.constexpr, GROUPS: tl.constexpr,
                 TILE: tl.constexpr):  # fmt: skip
    a = of.empty_state(TILE)
    for k in tl.static_range(GROUPS):
        begin = k * GROUP * TILE
        group_s = rows.fetch(s, begin, GROUPS * GROUP * TILE, TILE, GROUP, False)
        group_t = rows.fetch(t, begin, GROUPS * GROUP * TILE, TILE, GROUP, False)
        a = of.with_group(
            a, group_s, group_t, inv_temperature * rows.LOG2_E, "forward_kl", True, TILE
        )
    a = of.whole(a)
    for field in tl.static_range(10):
        tl.store(out + field, a[field])


@triton.jit
def log_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, of.log(tl.load(x + at)))


def test_wrong_ids_make_their_row_nan_where_nothing_can_be_raised(monkeypatch):
    """On a device: neither an id twice nor one out of range is looked at by the host."""
    from sadkern import ops
    from sadkern.backends import reference

    monkeypatch.setattr(ops, "check_values", lambda *arguments: None)
    monkeypatch.setattr(reference, "check_distinct", lambda *arguments: None)
    s, t = logits("random", 300, torch.float32, rows=5)
    expected = ours(s, likely(t, 4), "forward_kl", 0.0, "triton")
    wrong = likely(t, 4)
    wrong.ids[1, 2], wrong.ids[3, 0], wrong.ids[4, 3] = wrong.ids[1, 0], 300, 2**31 - 1
    value, gradient = ours(s, wrong, "forward_kl", 0.0, "triton")
    assert value.isnan().tolist() == [False, True, False, True, True]
    assert gradient.isnan().all(-1).tolist() == [False, True, False, True, True]
    for got, right in zip((value, gradient), expected, strict=True):
        assert torch.equal(got[[0, 2]], right[[0, 2]])


def test_too_many_tokens_of_a_teacher_are_refused():
    s, t = logits("random", 1200, torch.float32, rows=2)
    with pytest.raises(
        ValueError, match=r"teacher.ids has 1100 tokens a row, expected at most 1024"
    ):
        ours(s, likely(t, 1100), "forward_kl", 0.0, "triton")


def test_closed_form_of_the_log():
    """The kernels' own logarithm: all digits near 1, and 0 where it is multiplied by 0."""
    near = 1 + torch.linspace(-1e-3, 1e-3, 512)
    x = torch.cat([near, torch.logspace(-37, 37, 512)])
    out = torch.empty(1024)
    log_kernel[(1,)](x, out, 1024)
    exact = x.double().log()
    assert ((out.double() - exact).abs() <= 2e-7 * exact.abs() + 1e-12).all()
    zero = torch.zeros(1)
    log_kernel[(1,)](zero, out, 1)
    assert math.isfinite(out[0])
