"""A survey as one page: table, histograms, warnings, samples in colour. No script, no address."""

from __future__ import annotations

from html import escape

from sadkern.inspect.figure import svg
from sadkern.inspect.overlay import parts
from sadkern.inspect.survey import Group, Sample, Survey, summary
from sadkern.spans import ACT, REASON, UNSUPERVISED
from sadkern.spans.kinds import NAMES

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #d8dee4 }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: .8rem;
      border-radius: 6px; color: #59636e; max-height: 40rem; overflow-y: auto }
mark { background: none; font-weight: 600 } .reason { color: #0550ae } .act { color: #c0202b }
svg { max-width: 100%; height: auto } summary { cursor: pointer }
"""
CLASSES = {REASON: "reason", ACT: "act"}


def page(found: Survey) -> str:
    """HTML, in one piece."""
    files = ", ".join(escape(name) for name in found.files)
    pieces = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>Spans of {files}</title><style>{STYLE}</style>",
        f"<h1>Spans of {files}</h1>",
        f"<p>Lengths in {found.unit}. <mark class='reason'>REASON</mark>, "
        "<mark class='act'>ACT</mark>, and what is not supervised in grey.</p>",
        _table(found),
        "<h2>How long spans are</h2>",
        svg(found),
    ]
    if found.warnings:
        pieces.append("<h2>Warnings</h2><ul>")
        pieces += [
            f"<li>{escape(said)} ({warned.count:,}, first at {escape(str(warned.first))})</li>"
            for said, warned in found.warnings.items()
        ]
        pieces.append("</ul>")
    if found.faults:
        pieces.append("<h2>Lines that are no trajectory</h2><ul>")
        pieces += [f"<li>{escape(str(x.place))}: {escape(x.error)}</li>" for x in found.faults]
        pieces.append("</ul>")
    if found.samples:
        pieces.append("<h2>Samples</h2>")
        pieces += map(_sample, found.samples)
    return "\n".join([*pieces, "</html>", ""])


def _table(found: Survey) -> str:
    head = ["environment", "trajectories", "with spans", "supervised"]
    for kind in (REASON, ACT):
        head += [f"{NAMES[kind]} spans", "median", "95 %", "longest"]
    lines = "".join(f"<th>{name}</th>" for name in [*head, "profiles"])
    body = "".join(f"<tr>{_cells(name, group)}</tr>" for name, group in found.rows())
    return f"<table><tr>{lines}</tr>{body}</table>"


def _cells(name: str, group: Group) -> str:
    cells = [name, *group.shown()]
    for kind in (REASON, ACT):
        of = summary(group.lengths[kind])
        cells += [f"{of[key]:,.0f}" for key in ("count", "median", "p95", "max")]
    cells.append(", ".join(f"{x} {count:,}" for x, count in group.profiles.most_common()))
    return "".join(f"<td>{escape(cell)}</td>" for cell in cells)


def _sample(one: Sample) -> str:
    coloured = "".join(
        escape(part.text)
        if part.kind == UNSUPERVISED
        else f"<mark class='{CLASSES[part.kind]}' title='{NAMES[part.kind]}'>{escape(part.text)}"
        "</mark>"
        for part in parts(one.segmentation)
    )
    title = f"{one.environment}: {one.name} ({one.segmentation.profile}), {one.place}"
    return f"<details open><summary>{escape(title)}</summary><pre>{coloured}</pre></details>"
