"""What is asked of machine code for NVIDIA GPUs, by the disassembler that Triton brings."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

from sadkern.backends.triton import plans

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Usage(NamedTuple):
    """What cuobjdump says of the machine code, a thread's or a program's."""

    registers: int
    stack: int  # bytes; what is spilled is there
    shared: int  # bytes

    def refused(self, capability: tuple[int, int]) -> str:
        """Why a chip, or this project, would not have it."""
        if self.stack:
            return f"spills {self.stack} B a thread"
        if self.shared > plans.SHARED[capability]:
            return (
                f"takes {self.shared} B of the chip's {plans.SHARED[capability]} B of shared memory"
            )
        return ""


def resources(path: str) -> str:
    """cuobjdump's list of the kernels in a file and what they take."""
    command = [str(CUOBJDUMP), "-res-usage", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
