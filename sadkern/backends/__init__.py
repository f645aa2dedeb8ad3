"""Where rows are worked on. Every backend offers the same functions: `divergence_rows`,
`topk_rows`, `scale_` and `empty`, memory for what they write; `choose` says which serves a call.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from types import ModuleType

import torch

from sadkern.backends import cuda, native, reference

NAMES = ("reference", "native", "triton", "cuda")


def choose(name: str, dtype: torch.dtype, device: torch.device) -> ModuleType:
    """The backend called `name`; `auto` takes the fastest that serves logits of such a dtype there.

    Raises:
        ValueError: `name` is not a backend, or does not take this dtype.
        RuntimeError: the backend is not there, or does not serve this device.
    """
    if name == "auto":
        fast = "gpu" if device.type == "cuda" else "native"
        refusal = _refusal(fast, dtype, device)
        if refusal is None:
            return backend(fast)
        if dtype is not torch.float64:
            _warn_once(device.type, refusal)
        return reference
    if name not in NAMES:
        raise ValueError(f"backend={name!r}: expected auto, {', '.join(NAMES)}")
    refusal = _refusal(name, dtype, device)
    if refusal is not None:
        raise refusal
    return backend(name)


def backend(name: str) -> ModuleType:
    """The backend called `name`; `gpu`: the choice among those of GPUs. What needs Triton is
    imported with its first use."""
    if name in ("triton", "gpu"):
        return import_module(f"sadkern.backends.{name}")
    return {"reference": reference, "native": native, "cuda": cuda}[name]


def _refusal(name: str, dtype: torch.dtype, device: torch.device) -> Exception | None:
    """What keeps the backend called `name` from serving such logits there."""
    try:
        refusal: Exception | None = backend(name).serves(dtype, device)
    except ImportError as error:
        return RuntimeError(
            f"backend='triton': triton is missing ({error}). `pip install 'sadkern[triton]'` "
            "brings it, and so does torch for CUDA"
        )
    return refusal


_warned: set[str] = set()


def _warn_once(device: str, refusal: Exception) -> None:
    if device in _warned:
        return
    _warned.add(device)
    reason = (device == "cpu" and native.missing()) or refusal
    warnings.warn(
        f"sadkern runs on its slow reference backend: {reason}", RuntimeWarning, stacklevel=2
    )


def build_info() -> dict[str, object]:
    """What was built and what was chosen: compiler, OpenMP, the instruction sets that this
    processor can run and the one in use; `cuda`: the nvcc that built the CUDA kernels and the chips
    they are for, or why there are none. Without a compiled core only `native` says so.

    `SADKERN_ISA` in the environment (avx512, avx2 or baseline) overrides the choice.
    """
    built = {"cuda": cuda.missing() or cuda.built()}
    if native.missing():
        return {"native": native.missing(), **built}
    return {"native": True, **native.core().build_info(), **built}
