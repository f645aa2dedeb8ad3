"""Prints what the benchmarks found: ratios first, times last."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common import hardware


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    found = [b for b in getattr(session, "benchmarks", []) if b.extra_info]
    console = Console(file=terminalreporter._tw._file, width=120)
    for title in dict.fromkeys(b.group for b in found):
        rows = [b.extra_info for b in found if b.group == title]
        table = Table(title=f"{title}\n{hardware()}")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*(str(row.get(column, "")) for column in columns))
        console.print()
        console.print(table)
