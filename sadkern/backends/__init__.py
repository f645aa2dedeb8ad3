"""Where rows are worked on. Every backend offers the same two functions, `divergence_rows` and
`topk_rows`, and `empty`, memory for what they write; `choose` says which one serves a call.
"""

from __future__ import annotations

import warnings
from types import ModuleType

import torch

from sadkern.backends import native, reference

BACKENDS: dict[str, ModuleType] = {"reference": reference, "native": native}


def choose(name: str, dtype: torch.dtype, device: torch.device) -> ModuleType:
    """The backend called `name`; `auto` takes the fastest that serves logits of such a dtype there.

    Raises:
        ValueError: `name` is not a backend, or does not take this dtype.
        RuntimeError: the backend is not there, or does not serve this device.
    """
    if name == "auto":
        if native.serves(dtype, device) is None:
            return native
        if dtype is not torch.float64:
            _warn_once(device.type)
        return reference
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: expected auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    refusal: Exception | None = backend.serves(dtype, device)
    if refusal is not None:
        raise refusal
    return backend


_warned: set[str] = set()


def _warn_once(device: str) -> None:
    if device in _warned:
        return
    _warned.add(device)
    reason = native.missing() if device == "cpu" else f"no kernels for device {device!r}"
    warnings.warn(
        f"sadkern runs on its slow reference backend: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def build_info() -> dict[str, object]:
    """What was built and what was chosen: compiler, OpenMP, CUDA, the instruction sets that this
    processor can run and the one in use. Without a compiled core only `native` says so.

    `SADKERN_ISA` in the environment (avx512, avx2 or baseline) overrides the choice.
    """
    if native.missing():
        return {"native": native.missing()}
    return {"native": True, **native.core().build_info()}
