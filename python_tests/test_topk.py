"""What stands for a teacher: its most likely tokens, and tokens that are drawn instead."""

from __future__ import annotations

import pytest
import torch
from held import make
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import check_selection
from precision import (
    BACKENDS,
    HALVES,
    logits,
    ours,
)

from bench.formulas import logits_in_torch
from sadkern import Projection, TopK, sample_logprobs, span_kl, topk_logprobs
from sadkern.span_kl import TAILS

# The selection.


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("case", ["random", "near", "huge", "far", "banned", "saturated"])
def test_selection_and_its_sums(case, dtype, isa):
    for vocab, k in ((1, 1), (2, 2), (37, 5), (2048, 40), (4099, 64), (9001, 1024), (6000, 700)):
        x, _ = logits(case, vocab, dtype, rows=8)
        check_selection(x, k, topk_logprobs(x, k, backend="native"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_selection_with_a_temperature(backend, temperature):
    x, _ = logits("random", 3000, torch.float32, rows=8)
    found = topk_logprobs(x, 17, temperature=temperature, backend=backend)
    check_selection(x, 17, found, temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 31, 32, 33, 1024])
def test_ties_go_by_id(backend, k, request):
    generator = torch.Generator().manual_seed(k)
    few = torch.randint(-3, 3, (4, 5001), generator=generator).float()
    few[1] = 0.0
    few[2, ::2] = -0.0  # equal to 0
    few[3] = -torch.inf
    few[3, 4990:] = 1.0
    check_ids = torch.sort(few + 0.0, dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(topk_logprobs(few, k, backend=backend).ids.long(), check_ids)


def test_rows_that_are_hard_to_select_from(isa):
    """Every entry a candidate, none after the first, and all of the largest in the last lanes."""
    rising = torch.arange(20001.0) / 500
    x = torch.stack([rising, rising.flip(0), torch.cat([torch.zeros(19990), torch.ones(11)])])
    for k in (1, 50, 1024):
        check_selection(x, k, topk_logprobs(x, k, backend="native"))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_selection_is_that_of_a_stable_sort(data):
    vocab = data.draw(st.integers(1, 5000))
    k = data.draw(st.integers(1, min(vocab, 1024)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    levels = data.draw(st.sampled_from([1, 3, 100, 10**6]))
    x = torch.randint(-levels, levels + 1, (2, vocab), generator=generator) / levels * 8
    check_selection(x, k, topk_logprobs(x, k, backend="native"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_projections_tokens_are_those_of_its_logits(backend):
    source = make("projection", (3, 4), 90, torch.Generator().manual_seed(1))
    expected = topk_logprobs(logits_in_torch(source), 7, temperature=1.5, backend=backend)
    for chunk_rows in (1, 5, None):
        found = topk_logprobs(source, 7, temperature=1.5, chunk_rows=chunk_rows, backend=backend)
        assert torch.equal(found.ids, expected.ids)
        for name in ("logprobs", "tail_mass", "entropy", "lse"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_rows_of_any_layout_are_selected_from():
    x = torch.randn(3, 6, 5000, generator=torch.Generator().manual_seed(1))
    for view in (x[:, :-1], x.transpose(0, 1), x[..., 7:4000], x.movedim(-1, 0)):
        found = topk_logprobs(view, 3, backend="native")
        for got, expected in zip(
            vars(found).values(), vars(topk_logprobs(view.contiguous(), 3)).values(), strict=True
        ):
            assert torch.equal(got, expected)


def test_no_row_gives_nothing():
    assert topk_logprobs(torch.zeros(0, 9), 3).ids.shape == (0, 3)
    empty = Projection(torch.zeros(2, 0, 4), torch.zeros(9, 4))
    assert topk_logprobs(empty, 3).logprobs.shape == (2, 0, 3)
    assert sample_logprobs(empty, 3, seed=0).ids.shape == (2, 0, 3)


# Drawn tokens.


def dense(found, vocab):
    """[N, V]: the weights where they belong."""
    where = torch.where(found.ids < 0, vocab, found.ids).long()
    weights = found.logprobs.new_zeros(*found.ids.shape[:-1], vocab + 1)
    return weights.scatter_add(-1, where, found.logprobs.exp())[..., :vocab]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_weights_are_right_on_average(temperature):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, 40, generator=generator)
    p = (x / temperature).softmax(-1)
    n, draws = 16, 4000
    many = sample_logprobs(x.repeat(draws, 1), n, temperature=temperature, seed=1)
    weights = dense(many, 40).view(draws, 3, 40)
    torch.testing.assert_close(weights.sum(-1), torch.ones(draws, 3), rtol=1e-5, atol=1e-5)
    deviation = (p * (1 - p) / (n * draws)).sqrt()
    assert ((weights.mean(0) - p).abs() < 5 * deviation + 1e-7).all()


def test_the_gradient_to_drawn_tokens_is_the_full_one_on_average():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 30, generator=generator) for _ in range(2))
    draws = 4000
    exact = s.softmax(-1) - t.softmax(-1)
    leaf = s.repeat(draws, 1).requires_grad_()
    teacher = sample_logprobs(t.repeat(draws, 1), 8, seed=3)
    span_kl(
        leaf, teacher, torch.ones(2 * draws, dtype=torch.long), reduction="sum", tail="none"
    ).loss.backward()
    found = leaf.grad.view(draws, 2, 30)
    deviation = found.std(0) / draws**0.5
    assert ((found.mean(0) - exact).abs() < 5 * deviation + 1e-6).all()


def test_drawn_tokens_are_distinct_seeded_and_without_a_tail():
    x = 3 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    found = sample_logprobs(x, 32, seed=5)
    assert torch.equal(found.ids, sample_logprobs(x, 32, seed=5).ids)
    assert not torch.equal(found.ids, sample_logprobs(x, 32, seed=6).ids)
    torch.manual_seed(11)
    first = sample_logprobs(x, 32)
    torch.manual_seed(11)
    assert torch.equal(first.ids, sample_logprobs(x, 32).ids)
    for ids, weights in zip(found.ids, found.logprobs.exp(), strict=True):
        taken = ids[ids >= 0]
        assert len(taken.unique()) == len(taken)
        assert not weights[len(taken) :].any()
        assert (weights[:-1] >= weights[1:]).all()
        counts = weights * 32
        torch.testing.assert_close(counts, counts.round(), rtol=1e-5, atol=1e-5)
    lp = x.log_softmax(-1)
    torch.testing.assert_close(found.entropy, -(lp.exp() * lp).sum(-1))
    torch.testing.assert_close(found.lse, x.logsumexp(-1))
    results = [ours(x.flip(-1), found, "forward_kl", 0.0, "native", tail=tail) for tail in TAILS]
    for got in results[1:]:
        for mine, other in zip(got, results[0], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_a_projection_is_drawn_from_tile_by_tile():
    source = make("projection", (3, 4), 90, torch.Generator().manual_seed(1))
    expected = sample_logprobs(logits_in_torch(source), 7, seed=2)
    found = sample_logprobs(source, 7, seed=2)
    assert torch.equal(found.ids, expected.ids)
    assert found.ids.shape == (3, 4, 7)


# What is refused.

X = torch.randn(2, 3, 9)
IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize("function", [topk_logprobs, sample_logprobs])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": [1.0]}, "source is a list, expected logits"),
        ({"source": X.long()}, "source has dtype torch.int64, expected floating-point"),
        ({"source": TopK(IDS, X[..., 0])}, r"source.logprobs has shape|source is a TopK"),
        ({"source": X, "temperature": 0.0}, "temperature=0.0: expected a positive number"),
        ({"source": X, "chunk_rows": 0}, "chunk_rows=0: expected None or a positive number"),
        (
            {"source": X.masked_fill(torch.arange(6).view(2, 3, 1) == 4, torch.nan)},
            r"source\[1, 1\] has no distribution: log sum exp is nan",
        ),
        (
            {"source": X.masked_fill(torch.arange(6).view(2, 3, 1) == 2, -torch.inf)},
            r"source\[0, 2\] has no distribution",
        ),
    ],
)
def test_refused_sources(function, arguments, message):
    options = dict(arguments)
    source = options.pop("source")
    with pytest.raises(ValueError, match=message):
        function(source, 2, **options)


@pytest.mark.parametrize("k", [0, 10])
def test_refused_k(k):
    with pytest.raises(ValueError, match=f"k={k}: expected 1 to 9 for a vocabulary of 9"):
        topk_logprobs(X, k)
    with pytest.raises(ValueError, match="k=1025: expected 1 to 1024"):
        topk_logprobs(torch.zeros(1, 2000), 1025)
    with pytest.raises(ValueError, match="n=0: expected a positive number of draws"):
        sample_logprobs(X, 0)
