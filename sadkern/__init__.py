"""Structured agent distillation with fused kernels.

from sadkern import span_kl
"""

from sadkern._version import __version__
from sadkern.backends import build_info
from sadkern.span_kl import SpanLoss, span_kl

__all__ = ["SpanLoss", "__version__", "build_info", "span_kl"]
