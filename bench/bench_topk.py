"""A top-k teacher: how fast is it selected, and how fast is the loss to it?

    make bench
    pytest bench/bench_topk.py --benchmark-enable

The selection is beside `torch.topk` and `torch.logsumexp`, which together give less (no entropy,
no tail, no order of ties). The loss is forward KL over K + 1 buckets, both passes, beside what one
writes with `log_softmax`, `gather` and a masked `logsumexp`, and beside the loss to the teacher's
full logits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import copying, in_turns, name_of
from bench.formulas import assert_as_precise, eager_topk
from sadkern import TopK, span_kl, topk_logprobs

SHAPES = [(512, 32000, 32), (512, 32000, 256), (128, 128256, 64)]  # N, V, K
DTYPES = [torch.float32, torch.bfloat16]


def logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[N, V]"""
    return (2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.benchmark(group="topk_logprobs beside torch.topk + torch.logsumexp")
def test_selection(benchmark: Any, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, vocab, k = shape
    x = logits(rows, vocab, dtype)
    found = topk_logprobs(x, k)
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    assert torch.equal(found.ids.long(), order[:, :k])
    values, lse = torch.topk(x, k, -1).values, torch.logsumexp(x, -1)
    exact = x.double().log_softmax(-1).topk(k, -1).values
    assert_as_precise(found.logprobs, exact, values.float() - lse.float()[:, None], least=0)
    seconds = in_turns(
        benchmark,
        lambda: topk_logprobs(x, k),
        {
            "torch": lambda: (torch.topk(x, k, -1), torch.logsumexp(x, -1)),
            "copy": copying(x),
        },
        reset=lambda: None,
    )
    if seconds:
        read = x.nbytes / seconds["ours"] / (2 * x.nbytes / seconds["copy"])
        benchmark.extra_info["rows"] = [
            {
                "dtype": name_of(dtype),
                "(N, V, K)": str(shape),
                "x torch": seconds["torch"] / seconds["ours"],
                "read, of copy": read,
                "ms": 1e3 * seconds["ours"],
            }
        ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.benchmark(group="forward KL to a top-k teacher, forward and backward")
def test_loss(benchmark: Any, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, vocab, k = shape
    full = logits(rows, vocab, dtype, seed=1)
    teacher, span_ids = topk_logprobs(full, k), 1 + torch.arange(rows) % 2
    student = logits(rows, vocab, dtype).requires_grad_()

    def ours(x: Tensor, of: Tensor | TopK = teacher) -> Tensor:
        return span_kl(x, of, span_ids, reduction="token_mean").loss

    gradients = []
    for loss, kind in ((ours, dtype), (eager_topk, torch.float64), (eager_topk, dtype)):
        leaf = student.detach().to(kind).requires_grad_()
        (loss(leaf) if loss is ours else eager_topk(leaf, teacher)).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    got, exact, plain = gradients
    assert_as_precise(got, exact, plain, least=0)

    def reset() -> None:
        student.grad = None

    seconds = in_turns(
        benchmark,
        lambda: ours(student).backward(),
        {
            "torch": lambda: eager_topk(student, teacher).backward(),
            "full": lambda: ours(student, full).backward(),
        },
        reset=reset,
    )
    if seconds:
        benchmark.extra_info["rows"] = [
            {
                "dtype": name_of(dtype),
                "(N, V, K)": str(shape),
                "x torch": seconds["torch"] / seconds["ours"],
                "x full logits": seconds["full"] / seconds["ours"],
                "ms": 1e3 * seconds["ours"],
            }
        ]
