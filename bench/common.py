"""How a benchmark asks: peers in turns in one run, ratios of medians, traffic against copying.

Times on a shared machine are noise, so every round has every contestant, and what is reported is
the ratio of their medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sadkern.demo.hardware import hardware
from sadkern.files import write_json

Run = Callable[[], object]
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "trl", "liger-kernel")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of each package, or that it is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def record(name: str, tables: Mapping[str, object]) -> None:
    """Keeps tables as bench/results/NAME.json, with the hardware and the versions they are of."""
    kept = {"hardware": hardware(), "versions": versions(), "tables": tables}
    write_json(ROOT / "bench" / "results" / f"{name}.json", kept)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def name_of(dtype: torch.dtype) -> str:
    """As in `torch.float32`, without the module."""
    return str(dtype).removeprefix("torch.")


def in_turns(
    benchmark: Any, ours: Run, peers: dict[str, Run], *, reset: Run, rounds: int = 15
) -> dict[str, float]:
    """Median seconds of `ours`, under "ours", and of each peer, all taking a turn in every round.

    `reset` runs before every timing, unmeasured. In its turn each runs twice and is timed the
    second time: what the one before it left behind (cold caches, memory for the system to reclaim)
    is not its own cost. With benchmarks disabled everything runs and the result is empty.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def once(run: Run) -> float:
        reset()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def before_ours() -> None:
        for name, peer in peers.items():
            once(peer)
            seconds[name].append(once(peer))
        once(ours)
        reset()

    benchmark.pedantic(ours, setup=before_ours, rounds=rounds, warmup_rounds=2)
    if not benchmark.enabled:
        return {}
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    return {"ours": benchmark.stats.stats.median, **medians}


def copying(like: Tensor) -> Run:
    """Copies as many bytes as `like` has: the memory's speed, at two transfers a byte."""
    source, target = torch.ones_like(like), torch.empty_like(like)
    return lambda: target.copy_(source)
