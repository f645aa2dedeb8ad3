"""The study's tables, each of what was found (bench/results/reproduce.json) beside the paper's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bench.reproduce import paper
from bench.reproduce.study import ABLATED, KL, METHODS, METRICS, SIZES, TABLE_3, TABLE_5

Rows = Iterator[list[str]]
HEAD = ["", "success %", "reasoning tokens", "CoT match %", "steps", *KL]


def three(found: dict[str, Any]) -> Rows:
    """As the paper's Table 3, with hard labels, and students before they are taught."""
    yield [*HEAD, "paper: success / reasoning / CoT / steps"]
    yield _row("teacher", found["teacher"], _papers(paper.TEACHER))
    for number, size in enumerate(SIZES):
        yield _row(f"{size}, before it is taught", found["bases"][size])
        for method in TABLE_3:
            if f"{method}-{size}" in found["rows"]:
                theirs = paper.TABLE_3.get(method)
                said = _papers(theirs[number]) if theirs else ""
                name = f"{size}: {METHODS[method][0]}"
                yield _row(name, found["rows"][f"{method}-{size}"], said)


def five(found: dict[str, Any]) -> Rows:
    """As the paper's Table 5."""
    yield [*HEAD, "paper: success / CoT / steps"]
    for method, theirs in paper.TABLE_5.items():
        yield from _ablated(found, [method], _papers(theirs))


def more(found: dict[str, Any]) -> Rows:
    """What the paper has no numbers of."""
    yield [*HEAD, ""]
    yield from _ablated(found, [name for name in METHODS if name not in (*TABLE_3, *TABLE_5)])


def apart(found: dict[str, Any]) -> Rows:
    """Differences between methods, paired by game."""
    yield ["", *METRICS]
    for name, of in found["differences"].items():
        yield [name, *(_said(of[metric], "{:+.1f}") for metric in METRICS)]


def run(found: dict[str, Any]) -> Rows:
    """How all that was found."""
    sizes, hours = found["parameters"], found["core hours"]
    counts = [f"{name} {sizes[name] / 1e3:.0f}k" for name in [*SIZES, "teacher"]]
    yield ["", ""]
    yield ["games", f"{found['games']['tested']}, the same for all"]
    yield ["seeds of each way of teaching", ", ".join(map(str, found["seeds"]))]
    yield ["a student's steps", f"{found['steps']}, of {found['episodes of a step']} episodes"]
    yield ["parameters", ", ".join(counts)]
    yield ["time", f"{hours} core hours, {len(found['cells'])} students and all before them"]
    yield ["hardware", found["hardware"]]
    yield ["in brackets", "95 % intervals over games, of each of which the seeds' mean is taken"]


def _ablated(found: dict[str, Any], methods: Iterable[str], said: str = "") -> Rows:
    for method in methods:
        if f"{method}-{ABLATED}" in found["rows"]:
            yield _row(METHODS[method][0], found["rows"][f"{method}-{ABLATED}"], said)


def _row(name: str, of: dict[str, Any], papers: str = "") -> list[str]:
    kl = [f"{of[key]:.3f}" if key in of else "" for key in KL]
    return [name, *(_said(of[metric]) for metric in METRICS), *kl, papers]


def _papers(one: paper.Row) -> str:
    first = [one.success] + ([one.reasoning] if one.reasoning is not None else [])
    return " / ".join(f"{x:g}" for x in [*first, one.cot, one.steps])


def _said(one: dict[str, Any], form: str = "{:.1f}") -> str:
    low, high = form.format(one["low"]), form.format(one["high"])
    return f"{form.format(one['value'])} ({low} to {high})"
