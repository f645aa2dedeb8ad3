"""Time and memory of a case of bench.gpu: all contestants in turns on one device."""

from __future__ import annotations

import gc
import time
from typing import Protocol

import torch

from bench.common import Run
from bench.gpu import cases
from bench.gpu.cases import FLOORS, Case
from bench.gpu.report import Row, quartiles, with_ratios
from sadkern import backends

LEAST, MOST = 5, 100  # turns
ASLEEP = 10_000_000  # cycles, some milliseconds


class Clock(Protocol):
    """How a device is asked for time and memory."""

    def seconds(self, run: Run) -> float: ...
    def peak(self, run: Run) -> int: ...
    def free(self) -> int: ...


class DeviceClock:
    """Of a GPU: events on its stream, its allocator's peak."""

    def __init__(self, device: torch.device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flushed = torch.empty(max(64 << 20, 2 * cache), dtype=torch.uint8, device=device)

    def seconds(self, run: Run) -> float:
        """Of a run that finds nothing in the L2 cache and, as in training, a device that is not
        through with what came before: what the host takes to launch a run is not counted, unless
        the run waits for the device, or its own work is over before all of it is launched."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(ASLEEP)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, run: Run) -> int:
        """Bytes at the worst moment, beside what was there before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> int:
        """Bytes, once what nobody holds is given back."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def measure(
    case: Case,
    device: torch.device,
    clock: Clock,
    seconds: float,
    left_out: tuple[str, ...] = (),
) -> Row:
    """A case's row of the results. Turns are taken for `seconds`, by all but those whose names
    begin as `left_out` says; who fails, or is not installed, is noted and out of it."""
    contest = cases.contest(case, device)
    noted: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for name, make in contest.makers.items():
        if name.startswith(left_out):
            continue
        module = cases.missing(name)
        if module:
            noted[name] = {"absent": f"{module} is not installed"}
            continue
        try:
            run = make()
            for _ in range(2):  # compiles, tunes, loads
                contest.reset()
                run()
            contest.reset()
            peak = clock.peak(run)
            noted[name] = {} if name in FLOORS else {"peak_bytes": peak}
            runs[name] = run
        except Exception as error:
            noted[name] = {"failed": first_line(error)}
        contest.reset()
        clock.free()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    for turn in range(MOST):
        if turn >= LEAST and time.perf_counter() >= until:
            break
        for name in list(runs):
            contest.reset()
            try:
                samples[name].append(clock.seconds(runs[name]))
            except Exception as error:
                noted[name] = {"failed": first_line(error)}
                del runs[name]
    contest.reset()
    for name in runs:
        noted[name] |= quartiles(samples[name])
    tiles = cases.tiles_of(case, contest.logits) if contest.logits else None
    return with_ratios(
        {
            "part": case.part,
            "case": case.name,
            "shape": case.shape(),
            "backend": backends.choose("auto", case.dtype, device).__name__.rpartition(".")[2],
            "tiles_on_chip": tiles,
            "bytes_moved": None if tiles is None else cases.bytes_moved(case),
            "copied_bytes": 2 * cases.COPIED[device.type],
            "contestants": {name: one for name, one in noted.items() if name not in FLOORS},
            "floors": {name: one for name, one in noted.items() if name in FLOORS},
        }
    )


def first_line(error: BaseException) -> str:
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}"
