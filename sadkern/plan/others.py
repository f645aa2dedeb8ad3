"""What the loss would take if another library computed it, all else alike: counted in their code,
and held by `python -m bench.plan` against what torch tracks of their own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

BF16, FP32 = 2, 4  # bytes
# Of logits of all tokens, bytes an entry. Both models' in bf16 and as log-probabilities in fp32,
# the divergence's terms in fp32 and its gradient; of a top-k teacher the student's alone.
EAGER, EAGER_TOPK = 20, 12
# Both models' logits, what they are scaled to, log-probabilities, the mixture's parts and both
# divergences' terms, all in the logits' dtype.
GKD = 34
# TRL's stable DistillationTrainer: tiles of so many rows and columns, both models' in fp32, and the
# student's once more in bf16.
STABLE_ROWS, STABLE_COLUMNS = 4096, 32768
# Liger's fused linear JSD: chunks of so many rows, bytes an entry (not compiled), and the head's
# gradient twice, also where the head is frozen.
LIGER_ROWS, LIGER = 1024, 26


class Sizes(NamedTuple):
    """Of a step."""

    tokens: int
    rows: int  # that are supervised
    vocab: int
    width: int  # of the student
    trained: bool  # whether its head is
    likely: bool  # whether the teacher says its likeliest tokens alone


def _eager(x: Sizes) -> int:
    return (EAGER_TOPK if x.likely else EAGER) * x.tokens * x.vocab


def _gkd(x: Sizes) -> int:
    return GKD * x.tokens * x.vocab


def _stable(x: Sizes) -> int:
    tiles = (2 * FP32 + BF16) * min(x.rows, STABLE_ROWS) * STABLE_COLUMNS
    hidden = (FP32 + BF16) * x.rows * x.width
    return tiles + hidden + (FP32 + BF16) * x.vocab * x.width * x.trained


def _liger(x: Sizes) -> int:
    chunk = LIGER * min(x.rows, LIGER_ROWS) * x.vocab
    return chunk + 2 * BF16 * x.vocab * x.width + 2 * BF16 * x.rows * x.width


OTHERS: dict[str, Callable[[Sizes], int]] = {
    "eager logits": _eager,
    "TRL GKD": _gkd,
    "TRL stable": _stable,
    "Liger": _liger,
}
