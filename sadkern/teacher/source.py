"""What a trainer asks of a teacher, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from sadkern.sides import Side

Example = Mapping[str, Sequence[int]]  # input_ids [T], span_ids [T] of rows


class TeacherSource(Protocol):
    """Gives a batch's supervised rows their signal.

    What it may have beside its call: `expect`, of an `Expectant`; `facts`, of a `NamedSource`, by
    which a store keeps what it says; `close()`, which a trainer calls when `train` ends, and after
    which it may be asked again.
    """

    def __call__(self, rows: Tensor, **inputs: Any) -> Side:
        """What the teacher says of the M rows `rows`.

        rows: int64 `[M]`, ascending, places in the flattened `[B * T]`, on the student's device.
        inputs: input_ids `[B, T]`, and attention_mask, where they are padded on the right, or
            position_ids, where trajectories are packed one behind the other.
        Returns: logits `[M, V]`, a `Projection` or a `TopK` of M rows, on that device.
        """
        ...


@runtime_checkable
class Expectant(Protocol):
    """A source that wants to know what it will be asked, before the first step."""

    def expect(self, examples: Sequence[Example], *, tokenizer: Any, temperature: float) -> None:
        """ValueError: it cannot serve that; the message says what and why."""
        ...


class Trajectory(NamedTuple):
    """One of a batch, with what is supervised of it."""

    input_ids: np.ndarray
    """[T] without padding"""
    positions: np.ndarray
    """[R] int64: its supervised rows"""


def trajectories(
    rows: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Iterator[Trajectory]:
    """Those of a batch that have supervised rows, in its order. ValueError: padded on the left."""
    where, tokens = rows.cpu().numpy(), input_ids.flatten().cpu().numpy()
    if position_ids is not None:
        begins = np.flatnonzero(position_ids.flatten().cpu().numpy() == 0)
        ends = np.append(begins[1:], len(tokens))
    else:
        begins = np.arange(len(input_ids)) * input_ids.shape[1]
        ends = begins + input_ids.shape[1]
        if attention_mask is not None:
            if not bool(attention_mask[:, 0].all()):
                raise ValueError("a batch is padded on the left: expected padding on the right")
            ends = begins + attention_mask.sum(-1).cpu().numpy()
    for begin, end in zip(begins, ends, strict=True):
        first, last = np.searchsorted(where, (begin, end))
        if first < last:
            yield Trajectory(tokens[begin:end], where[first:last] - begin)
