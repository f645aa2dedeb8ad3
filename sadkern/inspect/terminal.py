"""A survey for people at a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from sadkern.inspect.overlay import COLOURS, in_terminal
from sadkern.inspect.survey import Group, Survey, summary
from sadkern.spans import ACT, REASON
from sadkern.spans.kinds import NAMES

NAMED = 10  # of warnings and errors, so many are shown


def show(found: Survey, console: Console) -> None:
    """Table, warnings, errors and samples."""
    console.print(table(found))
    whole = found.whole
    said = ", ".join(f"{name} {count:,}" for name, count in whole.profiles.most_common())
    console.print(f"profiles: {said}", markup=False)
    if found.unit == "tokens":
        cut = {NAMES[kind]: found.truncated[kind] for kind in (REASON, ACT)}
        if any(cut.values()):
            console.print(f"max_length cuts {cut['REASON']:,} REASON and {cut['ACT']:,} ACT tokens")
        if found.straddled:
            console.print(f"{found.straddled:,} tokens straddle the boundary of a span")
        if found.uncovered:
            console.print(f"{found.uncovered:,} characters of spans are in no token")
    for said, warned in list(found.warnings.items())[:NAMED]:
        times = "" if warned.count == 1 else f", {warned.count:,} times, first"
        console.print(f"warning{times} at {warned.first}: {said}", style="yellow", markup=False)
    for place, error in found.faults[:NAMED]:
        console.print(f"error at {place}: {error}", style="red", markup=False)
    for name, all_of_them in (("warnings", found.warnings), ("errors", found.faults)):
        if len(all_of_them) > NAMED:
            console.print(f".. and {len(all_of_them) - NAMED:,} more {name}: --json has them all")
    if not whole.trajectories:
        console.print("no trajectory was read", style="red")
    for one in found.samples:
        where = f"{Path(one.place.file).name}:{one.place.line}"
        title = f"{one.environment}: {one.name} ({one.segmentation.profile}), {where}"
        console.print(Panel(in_terminal(one.segmentation), title=title, title_align="left"))


def table(found: Survey) -> Table:
    """A line for each environment: coverage, and how many spans there are, how long."""
    made = Table(
        "environment", "number", "with spans", "supervised", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        caption=f"lengths in {found.unit}: median, 95th percentile", caption_justify="left",
    )  # fmt: skip
    for kind in (REASON, ACT):
        made.add_column(NAMES[kind], style=COLOURS[kind])
        made.add_column("length", style=COLOURS[kind])
    for column in made.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for i, (name, group) in enumerate(found.rows()):
        if i == len(found.environments):  # all of them
            made.add_section()
        made.add_row(*_cells(name, group))
    return made


def _cells(name: str, group: Group) -> list[str]:
    cells = [name, *group.shown()]
    for kind in (REASON, ACT):
        of = summary(group.lengths[kind])
        cells += [f"{of['count']:,}", f"{of['median']:,.0f}, {of['p95']:,.0f}"]
    return cells
