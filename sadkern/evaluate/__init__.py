"""How close a student has come to its teacher."""

from sadkern.evaluate.compare import Comparison, compare
from sadkern.evaluate.metrics import cot_match

__all__ = ["Comparison", "compare", "cot_match"]
