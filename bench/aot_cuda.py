"""What the CUDA kernels take, as nvcc compiled them into this installation: part of `bench.aot`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bench.machine_code import Usage, resources
from sadkern.backends import cuda
from sadkern.backends.kernels import MOST_TOKENS
from sadkern.span_kl import DIVERGENCES

CHIPS = {"sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90a": (9, 0)}
NAMES = {"Bf16": "bf16", "Fp16": "fp16"}
# Of a kernel's mangled name: its divergence (of the enumeration in csrc/divergence.h; none: the
# selection), dtype, and whether its rows are made of whole vectors.
KERNEL = re.compile(
    r"Function (\S*kernelI(?:LNS_10DivergenceE(\d)E)?\S*?4(Bf16|Fp16)ELb([01])E\S*?):\s*"
    r"REG:(\d+) STACK:(\d+)"
)


def kernels() -> Iterator[tuple[dict[str, Any], tuple[int, int], Usage]]:
    """Each: what it is, the chip it is for, what it takes. Nothing where none were built."""
    if cuda.missing():
        return
    module = cuda.core()
    for part in resources(module.__file__).split("Fatbin elf code:")[1:]:
        chip = re.search(r"arch = (\S+)", part)
        if chip is None or chip[1] not in CHIPS:
            continue
        for _, number, dtype, aligned, registers, stack in KERNEL.findall(part):
            kernel = "span_kl" if number else "topk"
            usage = Usage(int(registers), int(stack), module.shared_bytes[kernel])
            row = {
                "chip": chip[1],
                "kernel": f"{kernel}, CUDA",
                "logits": NAMES[dtype],
                "rows": "on chip" + ("" if aligned == "1" else ", by entries") + ", 32 warps",
                "divergence": DIVERGENCES[int(number)] if number else None,
                "tail": None,
                "k": None if number else MOST_TOKENS,
                "labels, softcap": True if number else None,
            }
            yield row, CHIPS[chip[1]], usage
