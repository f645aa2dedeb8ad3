"""Bytes that the Triton kernels move, per pair of logits, and the counter that says so."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bench import traffic
from bench.traffic import counted, logits, ours
from sadkern import TopK, topk_logprobs
from sadkern.span_kl import DIVERGENCES

SHORT, LONG = traffic.VOCABULARIES  # bf16 rows that are kept on chip, and that are not
PLAIN = ("forward_kl", "reverse_kl")
PER_ROW = 1.01  # loss, diagnostics and weight of a row
MARKS = 2  # a byte an entry: zeroed and read


@triton.jit
def some(x, y, z, n, m, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    loaded = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(y + at, loaded.to(tl.float32), mask=at < m)
    tl.atomic_add(z + at % 4, at, mask=at < 6)


def test_counter_counts_what_the_mask_lets_through():
    x, y, z = torch.ones(64).bfloat16(), torch.zeros(64), torch.zeros(4, dtype=torch.int32)
    with counted() as found:
        some[(2,)](x, y, z, 23, 9, TILE=64)
    # Each of two programs: 23 loads, 9 stores, and 6 atomic operations on 4 words.
    assert found == traffic.Bytes(
        loaded=2 * (23 * 2 + 4 * 4), stored=2 * (9 * 4 + 4 * 4), again=2 * 2 * 4
    )
    assert y.sum() == 9
    assert z.sum() == 2 * sum(range(6))


def test_counter_counts_nothing_else():
    x, y, z = torch.ones(64), torch.zeros(64), torch.zeros(4, dtype=torch.int32)
    with counted() as found:
        pass
    some[(1,)](x, y, z, 64, 64, TILE=64)
    assert found == traffic.Bytes()


def total(found: traffic.Bytes, entries: int) -> float:
    return (found.loaded + found.stored) / entries


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_rows_on_chip_are_read_once(name, inplace):
    s, t = logits(2, SHORT, torch.bfloat16)
    found = ours(s, t, name, inplace=inplace)
    assert 6 <= total(found, s.numel()) <= 6 * PER_ROW
    assert found.again == 0


@pytest.mark.parametrize(
    ("name", "inplace"), [("forward_kl", False), ("reverse_kl", True), ("jsd", False)]
)
def test_long_rows_are_read_in_each_sweep(name, inplace):
    s, t = logits(1, LONG, torch.bfloat16)
    most = 10 if name in PLAIN else 14
    assert most <= total(ours(s, t, name, inplace=inplace), LONG) <= most * PER_ROW


@pytest.mark.parametrize("teacher", ["logits", "top-k"])
def test_rows_that_are_not_supervised_are_not_read(teacher):
    s, t = logits(2, SHORT, torch.bfloat16)
    given = topk_logprobs(t, 64, backend="triton") if teacher == "top-k" else t
    found = ours(s, given, supervised=False)
    assert found.loaded == 2 * 5  # which rows are, and by what the gradient is scaled
    zeros = 2 if teacher == "logits" else 2 + MARKS / 2
    assert zeros <= found.stored / s.numel() <= zeros * PER_ROW


@pytest.mark.parametrize(("vocab", "most"), [(SHORT, 4), (LONG, 6)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_topk_teacher(name, vocab, most):
    s, t = logits(1, vocab, torch.bfloat16)
    found, ids = t.float().log_softmax(-1).topk(64)
    # Of each token: id, log-probability, logit, gradient, its mark set and cleared.
    tokens = 64 * (4 + 4 + 2 + 2 + 1 + 1) / vocab
    moved = total(ours(s, TopK(ids, found), name), vocab)
    assert most <= moved <= (most + MARKS) * PER_ROW + tokens


@pytest.mark.parametrize("vocab", [SHORT, LONG])
def test_topk_logprobs(vocab):
    # Besides the logits, up to 128 candidates: ids written and read, logits read; 64 written.
    found = traffic.selection(*logits(1, vocab, torch.bfloat16))
    assert 4 <= total(found, vocab) <= 4 * PER_ROW + 128 * (4 + 4 + 2 + 8) / vocab


def test_liger_moves_more():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    s, t = logits(1, SHORT, torch.bfloat16)
    jsd, kl = (total(f(s, t), SHORT) for f in (traffic.liger_jsd, traffic.liger_kl))
    assert jsd == 10 > total(ours(s, t, "jsd"), SHORT)
    assert kl == pytest.approx(8, rel=0.01)


def test_table():
    lines = [x for x in traffic.lines() if (x.dtype, x.vocab) == (torch.bfloat16, SHORT)]
    chosen = [x for x in lines if x.kernel in ("span_kl, tvd", "span_kl, not supervised")]
    table = [traffic.cells(line, 1) for line in chosen]
    assert table == [
        ["span_kl, tvd", "bf16", "32000", "1", "4.00", "2.00", "6.00", "0.00", "0"],
        ["span_kl, not supervised", "bf16", "32000", "0", "0.00", "2.00", "2.00", "0.00", "0"],
    ]
    written = traffic.markdown(table, 1)
    assert "| span_kl, tvd | bf16 | 32000 | 1 | 4.00 |" in written
    assert f"triton {triton.__version__}" in written
