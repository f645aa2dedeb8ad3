"""What a trainer asks of a teacher, whatever stands behind it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class TeacherSource(Protocol):
    """Gives the teacher's logits `[M, V]` of the rows `rows [M]` of a batch `[B, T]`, flattened."""

    def __call__(self, rows: Tensor, **inputs: Any) -> Tensor: ...
