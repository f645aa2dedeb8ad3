"""Structured agent distillation with fused kernels.

from sadkern import span_kl
"""

from sadkern._version import __version__
from sadkern.backends import build_info
from sadkern.sides import Projection, TopK
from sadkern.span_kl import SpanLoss, span_kl
from sadkern.topk import sample_logprobs, topk_logprobs

__all__ = [
    "Projection",
    "SpanLoss",
    "TopK",
    "__version__",
    "build_info",
    "sample_logprobs",
    "span_kl",
    "topk_logprobs",
]
