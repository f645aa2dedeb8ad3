"""The paper's own numbers for ALFWorld: its Table 3 (GPT-2 students of a GPT-2-1.5B teacher) and
Table 5 (its 340M student)."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """success, cot: per cent. reasoning: tokens. steps: thoughts and actions."""

    success: float
    cot: float
    steps: float
    reasoning: float | None = None


TEACHER = Row(71.2, 100.0, 5.8, 8.2)
SIZES = {"120M": 120, "340M": 340, "760M": 760}
TABLE_3 = {
    "token": [Row(39.4, 59.3, 9.1, 12.4), Row(52.1, 68.1, 7.8, 10.6), Row(60.2, 74.0, 7.0, 9.5)],
    "sad": [Row(43.7, 62.3, 8.2, 11.2), Row(56.3, 71.5, 7.1, 9.8), Row(64.8, 77.9, 6.4, 8.9)],
}
TABLE_5 = {
    "sad": Row(56.3, 71.5, 7.1),
    "reason": Row(52.7, 69.2, 7.4),
    "act": Row(49.5, 61.8, 7.8),
    "flat": Row(48.2, 60.4, 8.1),
    "random": Row(45.9, 57.7, 8.4),
}
