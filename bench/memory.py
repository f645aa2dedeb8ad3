"""How much memory a call takes beside what was there before: its peak, in a process of its own.

    python -m bench.memory bench.bench_projection Liger 2048x32000

prints bytes. The module has `runs(workload)`, named calls on their inputs, and `WARM_UP`, a small
workload that loads what is loaded late.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from importlib import import_module

import psutil

from bench.common import Run

INTERVAL = 0.0005  # seconds between samples


def extra_memory(run: Run) -> int:
    """Peak resident bytes over the call less those before it, by sampling; torch lets go of the
    interpreter in its operators, so that the sampler gets its turns."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    run()
    done.set()
    sampler.join()
    return max(peak, process.memory_info().rss) - before


def in_a_process(module: str, name: str, workload: str) -> int:
    """`extra_memory` of one of the module's runs."""
    command = [sys.executable, "-m", "bench.memory", module, name, workload]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    module_name, run_name, workload_name = sys.argv[1:]
    contest = import_module(module_name)
    contest.runs(contest.WARM_UP)[run_name]()
    print(extra_memory(contest.runs(workload_name)[run_name]))
