"""What figures were measured on."""

from __future__ import annotations

from pathlib import Path

import torch


def hardware() -> str:
    """The processor's name and the number of threads in use."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else 'unknown processor'}, {torch.get_num_threads()} threads"
