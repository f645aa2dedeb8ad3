"""Logits in, loss and gradient out: how much faster than PyTorch, eager and compiled?

    make bench                                                   everything, with a table
    pytest bench/bench_logits.py --benchmark-enable -k bfloat16  a part

The peers write what one writes without sadkern, `kl_div(log_softmax(s), log_softmax(t))`, in the
logits' own dtype. "of copy" is the traffic that cannot be avoided (both logits read, the gradient
written) per second, against copying memory in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import copying, in_turns, name_of
from bench.formulas import assert_as_precise, eager
from sadkern import span_kl
from sadkern.span_kl import DIVERGENCES

SHAPES = [(512, 32000), (128, 128256), (2048, 4096)]
DTYPES = [torch.float32, torch.bfloat16]
compiled = torch.compile(eager)


def logits(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student [N, V], its gradient wanted; teacher [N, V]; span ids [N], half of them of each."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (2 * torch.randn(rows, vocab, generator=generator)).to(dtype) for _ in range(2)
    )
    return student.requires_grad_(), teacher, 1 + torch.arange(rows) % 2


def ours(divergence: str, student: Tensor, teacher: Tensor, span_ids: Tensor) -> Tensor:
    """[]: the mean over rows."""
    return span_kl(student, teacher, span_ids, divergence=divergence, reduction="token_mean").loss


def gradient(loss: Callable[..., Tensor], student: Tensor, *rest: Tensor) -> Tensor:
    """[N, V] of `loss`."""
    leaf = student.detach().clone().requires_grad_()
    loss(leaf, *rest).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.benchmark(group="forward KL, forward and backward, beside PyTorch")
def test_forward_kl(benchmark: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    student, teacher, span_ids = logits(*shape, dtype)

    def run_ours() -> None:
        ours("forward_kl", student, teacher, span_ids).backward()

    exact = gradient(eager, student.double(), teacher.double())
    got = gradient(lambda *x: ours("forward_kl", *x), student, teacher, span_ids)
    assert_as_precise(got, exact, gradient(eager, student, teacher), least=0)

    def reset() -> None:
        student.grad = None

    seconds = in_turns(
        benchmark,
        run_ours,
        {
            "eager": lambda: eager(student, teacher).backward(),
            "compiled": lambda: compiled(student, teacher).backward(),
            "copy": copying(teacher),
        },
        reset=reset,
    )
    if seconds:
        copied = 2 * teacher.nbytes / seconds["copy"]
        traffic = 3 * teacher.nbytes / seconds["ours"]
        benchmark.extra_info["rows"] = [
            {
                "dtype": name_of(dtype),
                "(N, V)": str(shape),
                "x eager": seconds["eager"] / seconds["ours"],
                "x torch.compile": seconds["compiled"] / seconds["ours"],
                "of copy": traffic / copied,
                "copy GB/s": copied / 1e9,
                "ms": 1e3 * seconds["ours"],
            }
        ]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
@pytest.mark.benchmark(group="the other divergences at (512, 32000), beside forward KL")
def test_divergences(benchmark: Any, divergence: str, dtype: torch.dtype) -> None:
    student, teacher, span_ids = logits(512, 32000, dtype)

    def reset() -> None:
        student.grad = None

    seconds = in_turns(
        benchmark,
        lambda: ours(divergence, student, teacher, span_ids).backward(),
        {"forward_kl": lambda: ours("forward_kl", student, teacher, span_ids).backward()},
        reset=reset,
    )
    if seconds:
        benchmark.extra_info["rows"] = [
            {
                "dtype": name_of(dtype),
                "divergence": divergence,
                "time / forward_kl's": seconds["ours"] / seconds["forward_kl"],
                "ms": 1e3 * seconds["ours"],
            }
        ]
