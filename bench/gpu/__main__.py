"""Everything there is to know of sadkern on this machine's NVIDIA GPU, in one command.

    python -m bench.gpu                          right? how fast? in how much memory? (minutes)
    python -m bench.gpu --dry-run                what that would do; needs no GPU
    python -m bench.gpu --only logits --quick    a part, and less of it

First every backend is compared with the reference in float64. Then forward and backward are timed
beside PyTorch, eager and compiled, Liger and TRL, whichever are installed
(`pip install 'sadkern[triton,bench,peers]'`), all in turns, with the caches flushed before each.
What was found replaces, after every case, bench/results/GPU/gpu.json, gpu.md and gpu.png.
Exit status: 0, or 1 where a check failed or sadkern itself could not be timed, or 2 without a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from bench.common import ROOT, hardware, name_of, versions
from bench.gpu import cases, checks, choosing
from bench.gpu.cases import CASES, PARTS, Case
from bench.gpu.checks import QUICK, Check, Scope, Serving
from bench.gpu.report import OURS, Row, slug, write
from bench.gpu.timing import Clock, DeviceClock, first_line, measure

CORRECTNESS = "correctness"
PACKAGES = ("torch", "triton", "liger-kernel", "trl")


@dataclass
class Work:
    """What is to be done."""

    parts: Sequence[str] = (CORRECTNESS, *PARTS)
    scope: Scope = field(default_factory=Scope)
    cases: Sequence[Case] = CASES
    seconds: float = 6.0
    left_out: tuple[str, ...] = ()  # contestants, by how their names begin

    @property
    def timed(self) -> list[Case]:
        return [case for case in self.cases if case.part in self.parts]


def failures(checks: Iterable[Check], progress: Progress, total: int) -> list[Row]:
    """Of all checks; each is run, whatever became of those before it."""
    failed = []
    task = progress.add_task("correctness", total=total)
    for check in checks:
        try:
            check.run()
        except Exception as error:
            failed.append({"part": check.part, "name": check.name, "why": first_line(error)})
            progress.console.print(
                f"FAILED {check.part}: {check.name}: {first_line(error)}", markup=False
            )
        progress.advance(task)
    return failed


def run(
    work: Work,
    device: torch.device,
    clock: Clock,
    folder: Path,
    console: Console,
    choose: bool = False,
) -> int:
    """Does it all, writing down what is found as it is found; the exit status."""
    results: Row = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": machine(device),
        "versions": {"CUDA": str(torch.version.cuda), **versions(PACKAGES)},
        "seconds_per_case": work.seconds,
        "correctness": {"run": 0, "failed": [], "backends": [], "refused": {}},
        "cases": [],
        "skipped": [],
    }
    failed: list[Row] = []
    with Progress(console=console) as progress:
        if CORRECTNESS in work.parts:
            on, refused = checks.serving(device)
            every = list(checks.checks(work.scope, on))
            failed = failures(every, progress, len(every))
            results["correctness"] = {
                "run": len(every),
                "failed": failed,
                "backends": [f"{name} on {where.type}" for name, where in on],
                "refused": refused,
            }
            write(results, folder)
            console.print(f"{len(every) - len(failed)} of {len(every)} checks passed")
        wrong = {check["part"] for check in failed}
        task = progress.add_task("timing", total=len(work.timed))
        for case in work.timed:
            why = "its part failed a check" if case.part in wrong else too_large(case, clock)
            row: Row = {}
            if not why:
                try:
                    row = measure(case, device, clock, work.seconds, work.left_out)
                except Exception as error:
                    why = first_line(error)
                    failed.append({"part": case.part, "name": case.name, "why": why})
            if why:
                skipped = {"case": f"{case.part}: {case.name}", "why": why}
                results["skipped"] = [*results["skipped"], skipped]
            else:
                results["cases"] = [*results["cases"], row]
                if "failed" in row["contestants"][OURS]:
                    failed.append(row)
            console.print(f"{case.part}: {case.name}: {why or said(row)}", markup=False)
            write(results, folder)
            progress.advance(task)
    if choose:
        console.print(f"{choosing.remember(results)} rows of sadkern/backends/measured.json")
    console.print(f"written to {folder}: gpu.json, gpu.md, gpu.png", markup=False)
    return int(bool(failed))


def said(row: Row) -> str:
    """A line on a case."""
    ours = row["contestants"][OURS]
    if "failed" in ours:
        return ours["failed"]
    found = [f"{x:.1f}x {name}" for name, x in row["ratios"]["time_of_ours"].items()]
    out = [f"{name} {one['failed']}" for name, one in row["contestants"].items() if "failed" in one]
    return f"{1e3 * ours['median_s']:.3g} ms; " + "; ".join([*found, *out])


def too_large(case: Case, clock: Clock) -> str:
    """Why a case does not fit the memory; nothing if it does."""
    free = clock.free()
    if case.needs <= free:
        return ""
    return f"needs {case.needs / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free"


def machine(device: torch.device) -> Row:
    """The GPU, its driver, and the processor beside it."""
    if device.type != "cuda":
        return {"gpu": f"no GPU ({hardware()})", "driver": "none", "cpu": hardware()}
    of = torch.cuda.get_device_properties(device)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    return {
        "gpu": of.name,
        "driver": driver,
        "compute_capability": f"{of.major}.{of.minor}",
        "memory_bytes": of.total_memory,
        "multiprocessors": of.multi_processor_count,
        "l2_bytes": of.L2_cache_size,
        "cpu": hardware(),
    }


def plan(work: Work) -> list[str]:
    """What would be done, in lines."""
    lines = []
    if CORRECTNESS in work.parts:
        on: Serving = [
            (name, torch.device("cpu")) for name in ("triton", "cuda", "reference", "native")
        ]
        counted = Counter(
            (check.part, check.name.split()[0]) for check in checks.checks(work.scope, on)
        )
        scope = work.scope
        lines += [
            f"correctness: V = {', '.join(map(str, scope.vocabs))}; "
            f"{', '.join(map(name_of, scope.dtypes))}; {', '.join(scope.kinds)} rows; "
            "triton, cuda and reference on the GPU, native on the CPU, each where it serves",
            *(f"  {part}: {name}, {n} checks" for (part, name), n in sorted(counted.items())),
        ]
    for case in work.timed:
        names = [x for x in cases.contestants(case.part) if not x.startswith(work.left_out)]
        beside = [f"{x} (not installed)" if cases.missing(x) else x for x in names]
        lines.append(
            f"{case.part}: {case.name}, {name_of(case.dtype)}, at least "
            f"{case.needs / 2**30:.1f} GiB ({case.needs} bytes): {'; '.join(beside)}"
        )
    return lines


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser("python -m bench.gpu", None, __doc__, formatter_class=formatter)
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="list every case and what memory it needs; no GPU needed",
    )
    made.add_argument("--only", action="append", choices=(CORRECTNESS, *PARTS), metavar="PART",
        help=f"this part alone; may be repeated: {', '.join((CORRECTNESS, *PARTS))}")  # fmt: skip
    made.add_argument("--output", type=Path, default=ROOT / "bench" / "results", metavar="DIR",
        help="where a folder named after the GPU goes (default: bench/results)")  # fmt: skip
    made.add_argument("--seconds", type=float, metavar="S",
        help="for the turns of one case, besides warming up (default: 6, quick: 2)")  # fmt: skip
    made.add_argument("--choose", action="store_true",
        help="let backend='auto' choose Triton or CUDA by what is measured now")  # fmt: skip
    made.add_argument("--quick", action="store_true",
        help="fewer vocabularies and dtypes are checked, no torch.compile")  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    seconds = options.seconds
    if seconds is None:
        seconds = 2.0 if options.quick else 6.0
    work = Work(
        options.only or (CORRECTNESS, *PARTS),
        QUICK if options.quick else Scope(),
        seconds=seconds,
        left_out=("torch.compile",) if options.quick else (),
    )
    if options.dry_run:
        print(*plan(work), sep="\n")
        return 0
    if not torch.cuda.is_available() or torch.version.cuda is None:
        built = torch.version.cuda or torch.version.hip
        print(
            f"no NVIDIA GPU: torch {torch.__version__} (built for {built or 'the CPU alone'}) "
            f"finds {torch.cuda.device_count()} GPUs, on {hardware()}. Needed: an NVIDIA GPU of "
            "compute capability 8.0 or higher, its driver, and torch for CUDA. Without one, "
            "`python -m bench.gpu --dry-run` says what would be done.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    folder = options.output / slug(torch.cuda.get_device_name(device))
    return run(work, device, DeviceClock(device), folder, Console(), options.choose)


if __name__ == "__main__":
    sys.exit(main())
