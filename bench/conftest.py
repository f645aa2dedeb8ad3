"""Prints what the benchmarks found; with `--record` keeps it: bench/results/*.json, pictures."""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common import hardware, record

Rows = list[dict[str, Any]]


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--record",
        action="store_true",
        help="keep the results in bench/results and draw the pictures of docs/",
    )


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    found: defaultdict[str, defaultdict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    absent = set()
    for benchmark in getattr(session, "benchmarks", []):
        module = Path(benchmark.fullname.split("::")[0]).stem
        found[module][benchmark.group] += benchmark.extra_info.get("rows", [])
        absent |= {benchmark.extra_info["absent"]} if "absent" in benchmark.extra_info else set()
    console = Console(file=terminalreporter._tw._file, width=120)
    for module, groups in found.items():
        for title, rows in groups.items():
            console.print()
            console.print(table(title, rows))
        if config.getoption("--record"):
            record(module, groups)
            draw = getattr(import_module(f"bench.{module}"), "draw", None)
            if draw:
                draw(groups)
    for names in sorted(absent):
        console.print(f"\nnot installed, so left out: {names}")


def table(title: str, rows: Rows) -> Table:
    """Ratios first, times last, as the rows have them."""
    out = Table(title=f"{title}\n{hardware()}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        out.add_column(column, justify="right")
    for row in rows:
        out.add_row(*(shown(column, row.get(column, "")) for column in columns))
    return out


def shown(column: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return (
        f"{value:.0%}"
        if "of copy" in column
        else f"{value:.3g}"
        if value < 1000
        else f"{value:.0f}"
    )
