"""The CUDA kernels compiled as C++, to run on the CPU: see cuda_shim.h."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pybind11
import torch

from sadkern.span_kl import DIVERGENCES

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CXX = shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
FLAGS += ["-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]
# What is compiled: its source, and with which flags.
UNITS = {
    **{f"span_kl_{x}": ("span_kl.cu", f"-DSADKERN_DIVERGENCE={x}") for x in DIVERGENCES},
    "topk": ("topk.cu",),
    "bindings": ("bindings.cpp",),
    "shim": ("cuda_shim.cpp",),
}


def build(folder: Path, flags: Sequence[str] = ()) -> Path:
    """The module, in `folder` with what it is linked of."""
    return _linked(folder, CSRC / "cuda", UNITS, [], flags)


def broken(folder: Path, built: Path, file: str, old: str, new: str) -> Path:
    """One whose `file`, of csrc/cuda, says `new` where it says `old`; of the divergences only
    forward KL, and the rest from beside the one that is `built`."""
    sources = folder / "csrc" / "cuda"
    shutil.copytree(CSRC, sources.parent)
    text = (sources / file).read_text()
    assert text.count(old) == 1
    (sources / file).write_text(text.replace(old, new))
    changed = ["span_kl_forward_kl"] * (file != "topk.cu") + ["topk"] * (file != "span_kl.cu")
    kept = [built.with_name(f"{name}.o") for name in UNITS if name not in changed]
    return _linked(folder, sources, changed, kept, ())


def _linked(
    folder: Path, cuda: Path, units: Iterable[str], kept: list[Path], flags: Sequence[str]
) -> Path:
    others = [f"-isystem{x}" for x in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    common = [CXX, *FLAGS, *flags, f"-I{HERE}", *others, "-xc++", "-c"]

    def compiled(name: str) -> Path:
        source, *more = UNITS[name]
        path = HERE / source if name == "shim" else cuda / source
        out = folder / f"{name}.o"
        subprocess.run([*common, *more, path, "-o", out], check=True)
        return out

    with ThreadPoolExecutor() as pool:
        objects = [*pool.map(compiled, units), *kept]
    target = folder / "_cuda_shim.so"
    subprocess.run([CXX, "-shared", *flags, *objects, "-o", target], check=True)
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda_shim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counts(NamedTuple):
    """How often each entry of watched logits was read and written."""

    loads: torch.Tensor
    stores: torch.Tensor


class Control:
    """What the shim of a built module is told and asked."""

    def __init__(self, path: Path):
        self._lib = ctypes.CDLL(str(path))
        self._lib.shim_loaded.restype = self._lib.shim_stored.restype = ctypes.c_uint64

    def run_backwards(self, yes: bool) -> None:
        self._lib.shim_run_backwards(ctypes.c_bool(yes))

    def watch(self, logits: torch.Tensor) -> Counts:
        """Of the memory of `logits`, in its shape."""
        counts = Counts(*(torch.zeros(logits.shape, dtype=torch.uint8) for _ in range(2)))
        assert logits.is_contiguous()
        assert logits.itemsize == 2
        self._lib.shim_watch(
            ctypes.c_void_p(logits.data_ptr()), ctypes.c_size_t(logits.numel()),
            *(ctypes.c_void_p(x.data_ptr()) for x in counts),
        )  # fmt: skip
        return counts

    def unwatch(self) -> None:
        self._lib.shim_unwatch()

    def traffic(self) -> tuple[int, int]:
        """Bytes of logits that were read and written since it was asked last."""
        return self._lib.shim_loaded(), self._lib.shim_stored()
