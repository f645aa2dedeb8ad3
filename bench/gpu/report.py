"""What bench.gpu found, for people and programs: gpu.json, gpu.md and gpu.png."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import table
from bench.gpu.cases import FLOORS, PARTS
from sadkern.files import write_json, write_whole

TITLES = {
    "logits": "Logits in, loss and gradient of the logits out",
    "projection": "Hidden states in, gradients of hidden states and head out",
    "topk-teacher": "A top-k teacher: loss and gradient of the logits",
    "topk": "Selection of a teacher's most likely tokens",
}
EXPLAINED = (
    "Ratios of medians, all contestants in turns: 2.0x is twice sadkern's time. Of copy bandwidth:",
    "bytes that the kernel must move, per second, of those that a copy reads and writes. Of the",
    "four GEMMs: the time of the products alone, in the inputs' dtype, of sadkern's time. Before a",
    "run the device has other work, as in training: what the host takes to launch it is hidden.",
)
OURS = "sadkern"
Row = dict[str, Any]


def slug(name: str) -> str:
    """A folder's name for a GPU's.

    >>> slug("NVIDIA RTX A6000")
    'nvidia-rtx-a6000'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def quartiles(seconds: Sequence[float]) -> Row:
    """Median and quartiles of what was timed."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median_s": median,
        "lower_quartile_s": lower,
        "upper_quartile_s": upper,
        "turns": len(seconds),
    }


def with_ratios(row: Row) -> Row:
    """The same, with what the numbers of a case say of each other, as far as they are there."""
    found = row["contestants"]
    ours, floors = found.get(OURS, {}), row.get("floors", {})
    ratios: Row = {"time_of_ours": {}, "memory_of_ours": {}}
    for name, one in found.items():
        if name == OURS or "median_s" not in one or "median_s" not in ours:
            continue
        ratios["time_of_ours"][name] = one["median_s"] / ours["median_s"]
        if ours["peak_bytes"]:
            ratios["memory_of_ours"][name] = one["peak_bytes"] / ours["peak_bytes"]
    copy, products = (floors.get(name, {}).get("median_s") for name in FLOORS)
    if copy:
        ratios["copy_bytes_per_s"] = row["copied_bytes"] / copy
    if "median_s" in ours:
        if copy and row.get("bytes_moved"):
            speed = row["bytes_moved"] / ours["median_s"]
            ratios["of_copy_bandwidth"] = speed / ratios["copy_bytes_per_s"]
        if products:
            ratios["of_gemm_floor"] = products / ours["median_s"]
    return {**row, "ratios": ratios}


def markdown(results: Row) -> str:
    """Ratios first, then every contestant's own numbers, then what failed or is missing."""
    hardware, versions = results["hardware"], results["versions"]
    lines = [
        f"# {hardware['gpu']}",
        "",
        f"`python -m bench.gpu`, {results['date']}: driver {hardware['driver']}, "
        + ", ".join(f"{name} {found}" for name, found in versions.items())
        + ".",
        "",
        *EXPLAINED,
        "",
        *_verdict(results),
    ]
    timed = sorted({row["backend"] for row in results["cases"]})
    if timed:
        lines += ["", f"Timed is sadkern's backend {' and '.join(timed)}."]
    for part in PARTS:
        rows = [row for row in results["cases"] if row["part"] == part]
        if rows:
            lines += ["", f"## {TITLES[part]}", "", *_ratio_table(rows), "", *_own_numbers(rows)]
    if results["skipped"]:
        lines += [
            "",
            "## Left out",
            "",
            *(f"- {x['case']}: {x['why']}" for x in results["skipped"]),
        ]
    return "\n".join(lines) + "\n"


def _verdict(results: Row) -> list[str]:
    correctness = results["correctness"]
    if not correctness["run"]:
        return ["Correctness was not checked in this run."]
    failed = correctness["failed"]
    passed = f"{correctness['run'] - len(failed)} of {correctness['run']} checks passed"
    served = f"backends: {', '.join(correctness['backends'])}"
    refused = [f"- not checked: {name}, {why}" for name, why in correctness["refused"].items()]
    return [f"{passed} ({served}).", *refused, *(f"- FAILED {_failure(x)}" for x in failed)]


def _failure(check: Row) -> str:
    return f"{check['part']}: {check['name']}: {check['why']}"


def _ratio_table(rows: list[Row]) -> list[str]:
    peers = list(dict.fromkeys(name for row in rows for name in row["contestants"] if name != OURS))
    fractions = {"of_copy_bandwidth": "of copy bandwidth", "of_gemm_floor": "of the four GEMMs"}
    shown = {
        key: title for key, title in fractions.items() if any(key in r["ratios"] for r in rows)
    }
    head = ["case", *peers, *shown.values(), "sadkern, ms", "copy, GB/s"]
    lines = []
    for row in rows:
        ratios, ours = row["ratios"], row["contestants"].get(OURS, {})
        copy = ratios.get("copy_bytes_per_s")
        lines.append(
            [
                row["case"],
                *(_ratio(row, name) for name in peers),
                *(f"{ratios[key]:.0%}" if key in ratios else "" for key in shown),
                _milliseconds(ours),
                "" if copy is None else f"{copy / 1e9:.0f}",
            ]
        )
    return table(head, lines)


def _ratio(row: Row, name: str) -> str:
    times = row["ratios"]["time_of_ours"]
    return f"{times[name]:.1f}x" if name in times else _absence(row["contestants"].get(name, {}))


def _absence(one: Row) -> str:
    return "absent" if "absent" in one else "failed" if "failed" in one else ""


def _milliseconds(one: Row) -> str:
    return f"{1e3 * one['median_s']:.3g}" if "median_s" in one else _absence(one)


def _own_numbers(rows: list[Row]) -> list[str]:
    head = ["case", "", "ms", "quartiles", "extra MiB", "memory, of sadkern's", ""]
    lines = []
    for row in rows:
        for name, one in {**row["contestants"], **row["floors"]}.items():
            memory = row["ratios"]["memory_of_ours"].get(name)
            timed = "median_s" in one
            low, high = (one.get(f"{x}_quartile_s", 0.0) for x in ("lower", "upper"))
            peak = one.get("peak_bytes")
            lines.append(
                [
                    row["case"],
                    name,
                    _milliseconds(one),
                    f"{1e3 * low:.3g} to {1e3 * high:.3g}" if timed else "",
                    "" if peak is None else f"{peak / 2**20:.0f}",
                    "" if memory is None else f"{memory:.1f}x",
                    one.get("failed", one.get("absent", "")).replace("|", "\\|"),
                ]
            )
    return table(head, lines)


def draw(results: Row, path: Path) -> None:
    """Bars: how many times sadkern's time each peer took."""
    from matplotlib.figure import Figure

    rows = [row for row in results["cases"] if row["ratios"]["time_of_ours"]]
    lengths = [1 + len(row["ratios"]["time_of_ours"]) for row in rows] or [1]
    figure = Figure(figsize=(9, 1 + 0.3 * sum(lengths)), layout="constrained")
    axes = figure.subplots(len(lengths), 1, squeeze=False, height_ratios=lengths)[:, 0]
    for axis, row in zip(axes, rows, strict=False):
        bars = {OURS: 1.0, **row["ratios"]["time_of_ours"]}
        names = list(bars)[::-1]
        colours = ["#c2410c" if name == OURS else "#94a3b8" for name in names]
        drawn = axis.barh(names, [bars[name] for name in names], color=colours)
        axis.bar_label(drawn, fmt="%.1fx", padding=3, fontsize=8)
        axis.set_title(f"{row['part']}: {row['case']}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
        axis.tick_params(labelsize=8)
    if not rows:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "nothing was timed", ha="center")
    figure.suptitle(f"time, of sadkern's: {results['hardware']['gpu']}", fontsize=9)
    figure.savefig(path, dpi=150)


def write(results: Row, folder: Path) -> None:
    """All three files, in place of what an earlier part left there."""
    write_json(folder / "gpu.json", results)
    write_whole(folder / "gpu.md", markdown(results).encode())
    draw(results, folder / "gpu.png")
