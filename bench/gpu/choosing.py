"""What `backend="auto"` chooses between the kernels for GPUs, from what was timed of both."""

from __future__ import annotations

import json
from pathlib import Path

from bench.gpu.cases import EITHER
from bench.gpu.report import Row
from sadkern import backends
from sadkern.files import write_json

PATH = Path(backends.__file__).with_name("measured.json")


def measured(results: Row) -> list[Row]:
    """A `sadkern.backends.gpu.Measured` of each case in which both took part."""
    hardware, found = results["hardware"], []
    for row in results["cases"]:
        of_triton, of_cuda = (row["contestants"].get(name, {}) for name in EITHER)
        if "median_s" in of_triton and "median_s" in of_cuda:
            shape = row["shape"]
            found.append({
                "gpu": hardware["gpu"],
                "capability": [int(x) for x in hardware["compute_capability"].split(".")],
                "kernel": "topk" if row["part"] == "topk" else shape["divergence"],
                "vocab": shape["vocab"],
                "triton_s": of_triton["median_s"],
                "cuda_s": of_cuda["median_s"],
            })  # fmt: skip
    return found


def remember(results: Row, path: Path = PATH) -> int:
    """Replaces what the committed table has of this GPU; how many rows that are now."""
    new = measured(results)
    gpus = {row["gpu"] for row in new}
    kept = [row for row in json.loads(path.read_text()) if row["gpu"] not in gpus]
    write_json(path, kept + new)
    return len(new)
