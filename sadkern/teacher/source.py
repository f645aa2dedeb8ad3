"""What a trainer asks of a teacher, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sadkern.sides import Side

Example = Mapping[str, Sequence[int]]  # input_ids [T], span_ids [T] of rows


class TeacherSource(Protocol):
    """Gives a batch's supervised rows their signal."""

    def __call__(self, rows: Tensor, **inputs: Any) -> Side:
        """What the teacher says of the M rows `rows`.

        rows: int64 `[M]`, ascending, places in the flattened `[B * T]`, on the student's device.
        inputs: input_ids and attention_mask `[B, T]`, right-padded.
        Returns: logits `[M, V]`, a `Projection` or a `TopK` of M rows, on that device.
        """
        ...


@runtime_checkable
class Expectant(Protocol):
    """A source that wants to know what it will be asked, before the first step."""

    def expect(self, examples: Sequence[Example], *, tokenizer: Any, temperature: float) -> None:
        """ValueError: it cannot serve that; the message says what and why."""
        ...
