"""The whole study, or one cell of it: `python -m bench.reproduce --help`."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from bench.reproduce import material, report, students
from bench.reproduce.study import CELLS, GAMES_SEED, ROOMS, SIZES, Folder
from sadkern.evaluate.environments import alfworld, alfworld_games
from sadkern.evaluate.episode import read
from sadkern.evaluate.script import LOG
from sadkern.files import write_json

TEST_GAMES, TEST_SPLIT = 72, "valid_unseen"
DESCRIPTION = """\
The paper's comparison at small scale, in ALFWorld's own engine (pip install 'sadkern[alfworld]').
Hours on two cores; what is done stays done, and the same command goes on. With --write its tables
and pictures go to bench/results."""


def jobs() -> list[dict[str, Callable[[Folder], None]]]:
    """By name, in stages of which each needs the one before."""
    parts = range(material.PARTS)
    return [
        {f"episodes-{part}": partial(material.episodes, part=part) for part in parts},
        {"tokenizer": material.train_tokenizer},
        {
            "teacher": material.train_teacher,
            **{f"base-{size}": partial(material.train_base, size=size) for size in SIZES},
        },
        {
            "signal": material.write_signal,
            "teacher-plays": partial(students.play_model, path=Path("teacher")),
            **{
                f"base-{size}-plays": partial(students.play_model, path=Path("base") / size)
                for size in SIZES
            },
        },
        {cell.name: partial(students.teach, name=cell.name) for cell in CELLS},
    ]


def do(folder: Folder, name: str) -> bool:
    """A job, in a process of its own; whether it is done."""
    if folder.done(name).exists():
        return True
    begun = time.time()
    # On one core, and as many jobs as there are cores: what a job computes depends on it alone.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.reproduce", "--output", str(folder.root), "--job", name]
    folder.log(name).parent.mkdir(parents=True, exist_ok=True)
    with folder.log(name).open("w") as log:
        code = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    if code == 0:
        write_json(folder.done(name), {"seconds": round(time.time() - begun)})
    return code == 0


def everything(folder: Folder, wanted: Iterable[str], workers: int) -> list[str]:
    """What failed, of the first stage in which something did."""
    stages = [[name for name in stage if name in wanted] for stage in jobs()]
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        bar = progress.add_task("", total=sum(map(len, stages)))
        for stage in stages:
            failed = []
            progress.update(bar, description=f"{stage[0]} .." if stage else "")
            for name, done in zip(stage, pool.map(partial(do, folder), stage), strict=True):
                progress.update(bar, advance=1, description=name)
                failed += [] if done else [name]
            if failed:
                return failed
    return []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce", description=DESCRIPTION)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="A folder for all that is made.")
    add(
        "--games", type=Path, help="ALFWorld's games to be tested on, those of its split "
        f"{TEST_SPLIT} (JSON Lines or .gz). Default: games of our own, of another seed.",
    )  # fmt: skip
    add("--workers", type=int, default=os.cpu_count() or 1, help="Processes, each on one core.")
    add(
        "--cell",
        help="Only this one and what it needs, such as sad-middle-0; its numbers beside "
        "those in bench/results.",
    )
    add("--again", action="store_true", help="Teach --cell anew, and say whether it does the same.")
    add("--write", action="store_true", help="Tables and pictures to bench/results.")
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Folder(args.output)
    known = {name: job for stage in jobs() for name, job in stage.items()}
    if args.job:
        known[args.job](folder)
        return 0
    cells = [cell.name for cell in CELLS]
    if args.cell and args.cell not in cells:
        parser.error(f"--cell {args.cell}: expected one of {', '.join(cells)}")
    if args.again and not args.cell:
        parser.error("--again: which? Name it by --cell, such as --cell sad-middle-0")
    if args.cell and args.write:
        parser.error("--write is of the whole study: expected no --cell beside it")
    if not folder.test_games.exists():
        games = test_games(args.games)
        if not games:
            parser.error(f"{args.games}: none of its games is of the split {TEST_SPLIT}")
        material.write_test_games(folder, games)
    unneeded = unneeded_for(args.cell) if args.cell else set()
    wanted = [name for name in known if name not in unneeded]
    before = set_aside(folder, args.cell) if args.again else None
    failed = everything(folder, wanted, args.workers)
    for name in failed:
        lines = folder.log(name).read_text(errors="replace").splitlines()[-15:]
        print(f"{name} failed ({folder.log(name)}):\n  " + "\n  ".join(lines), file=sys.stderr)
    if not failed and before is not None:
        return again(before, folder.cell(args.cell))
    if not failed and args.cell:
        report.tell_cell(folder, args.cell)
    elif not failed:
        report.tell(folder, args.write)
    return 1 if failed else 0


def unneeded_for(cell: str) -> set[str]:
    """What the cell does without: other cells, and bases of another size."""
    size = next(one.size for one in CELLS if one.name == cell)
    others = {one.name for one in CELLS} | {f"base-{other}" for other in SIZES}
    return {*others, *(f"base-{other}-plays" for other in SIZES)} - {cell, f"base-{size}"}


def set_aside(folder: Folder, cell: str) -> Path | None:
    """What the cell came to before; None: it was not done."""
    if not folder.done(cell).exists():
        return None
    kept = folder.cell(f"{cell}.before")
    shutil.rmtree(kept, ignore_errors=True)
    folder.cell(cell).rename(kept)
    folder.done(cell).unlink()
    return kept


def again(before: Path, after: Path) -> int:
    """0: the same episodes, word for word."""
    old, new = (list(read([path / LOG])) for path in (before, after))
    same = sum(a == b for a, b in zip(old, new, strict=True))
    won = [sum(one.success for one in episodes) for episodes in (old, new)]
    print(f"{after.name}: won {won[0]} and {won[1]} of {len(old)}; {same} episodes word for word")
    return 0 if same == len(old) else 1


def test_games(path: Path | None) -> list[dict]:
    if path is None:
        return [alfworld_games.game(GAMES_SEED + 1, n, **ROOMS) for n in range(TEST_GAMES)]
    return [game for game in alfworld.games(path) if game.get("split") == TEST_SPLIT]


if __name__ == "__main__":
    sys.exit(main())
