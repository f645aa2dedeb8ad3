"""The paper's metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def cot_match(student: Sequence[Hashable], teacher: Sequence[Hashable]) -> float:
    """The share of the teacher's reasoning tokens that the student's reasoning has too.

    |student ∩ teacher| / |teacher| over multisets of tokens (*Structured Agent Distillation*,
    appendix C); 1 where the teacher has none.

    >>> cot_match("abcdefxyz", "abcdefghi")  # 6 of the teacher's 9
    0.6666666666666666
    """
    if not teacher:
        return 1.0
    return (Counter(student) & Counter(teacher)).total() / len(teacher)
