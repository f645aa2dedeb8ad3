"""Hidden states in, loss and gradients of hidden states and head out: how fast, in how much memory?

    make bench                                       everything, with tables and pictures
    pytest bench/bench_projection.py --benchmark-enable -k 2048x32000

Forward KL between projections of which 40 % of the rows are supervised, beside what there is:

    eager            PyTorch, logits of all rows
    eager, rows      PyTorch, logits of supervised rows
    Liger            LigerFusedLinearJSDLoss(beta=0, compiled=False)
    TRL, rows        ChunkedDivergenceFunction on supervised rows
    four GEMMs       the products alone, on supervised rows: what no implementation undercuts

Gradients of all are compared with float64 first. Extra memory is the peak over one call, forward
and backward, in a process of its own. Peers that are not installed are named and left out
(`pip install 'sadkern[peers]'`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
from torch import Tensor

from bench import projections
from bench.common import ROOT, Run, hardware, in_turns
from bench.formulas import assert_as_precise
from bench.memory import in_a_process
from bench.projections import Inputs, eager, eager_rows, four_products, liger, ours, trl_rows

WORKLOADS = ("2048x32000", "1024x128256")  # N x V
WARM_UP = "8x64"
SUPERVISED = 0.4
WIDTHS = (512, 768)  # D of student and teacher


def inputs(workload: str, supervised: float = SUPERVISED) -> Inputs:
    rows, vocab = map(int, workload.split("x"))
    return projections.inputs(rows, vocab, WIDTHS, supervised)


def ours_with_longer_chunks(x: Inputs) -> Run:
    """Of more rows than the default budget of 64 MiB has for a large vocabulary."""
    return ours(x, chunk_rows=176)


CONTESTANTS: dict[str, Callable[[Inputs], Run]] = {
    "sadkern": ours,
    "chunk_rows=176": ours_with_longer_chunks,
    "eager": eager,
    "eager, rows": eager_rows,
    "Liger": liger,
    "TRL, rows": trl_rows,
    "four GEMMs": four_products,
}
NEEDS = {"Liger": "liger_kernel", "TRL, rows": "trl"}
ABSENT = [name for name, module in NEEDS.items() if find_spec(module) is None]


def runs(workload: str) -> dict[str, Run]:
    return runs_on(inputs(workload))


def runs_on(x: Inputs) -> dict[str, Run]:
    return {name: make(x) for name, make in CONTESTANTS.items() if name not in ABSENT}


def gradients(make: Callable[[Inputs], Run], x: Inputs) -> tuple[Tensor, Tensor]:
    x.reset()
    make(x)()
    assert x.hidden.grad is not None
    assert x.weight.grad is not None
    return x.hidden.grad, x.weight.grad


def check(x: Inputs) -> None:
    """Nobody is timed who is wrong."""
    exact, plain = gradients(eager_rows, x.double()), gradients(eager_rows, x)
    for name, make in CONTESTANTS.items():
        if name in ABSENT or make is four_products:
            continue
        for got, truth, torchs in zip(gradients(make, x), exact, plain, strict=True):
            assert_as_precise(got, truth, torchs, least=0)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.benchmark(group="projections: forward KL, 40 % of the rows supervised, fp32")
def test_projection(benchmark: Any, workload: str) -> None:
    x = inputs(workload)
    check(inputs(f"256x{x.weight.shape[0]}"))
    competing = runs_on(x)
    own = competing.pop("sadkern")
    rounds = 5 if workload == WORKLOADS[0] else 3
    seconds = in_turns(benchmark, own, competing, reset=x.reset, rounds=rounds)
    if not seconds:
        return
    rows: list[dict[str, Any]] = []
    for name, taken in {"sadkern": seconds.pop("ours"), **seconds}.items():
        row = {"N x V": workload, "contestant": name, "seconds": taken}
        if name != "four GEMMs":
            row["extra MiB"] = in_a_process("bench.bench_projection", name, workload) / 2**20
        rows.append(row)
    mine = rows[0]
    for row in rows:
        row["time / ours"] = row["seconds"] / mine["seconds"]
        if "extra MiB" in row:
            row["memory / ours"] = row["extra MiB"] / mine["extra MiB"]
    benchmark.extra_info["rows"] = rows
    if ABSENT:
        benchmark.extra_info["absent"] = f"{', '.join(ABSENT)}: pip install 'sadkern[peers]'"


@pytest.mark.benchmark(group="skipping: time at 15 % of the rows supervised, of that at 60 %")
def test_skipping(benchmark: Any) -> None:
    few, many = inputs(WORKLOADS[0], 0.15), inputs(WORKLOADS[0], 0.6)

    def reset() -> None:
        few.reset()
        many.reset()

    seconds = in_turns(benchmark, ours(few), {"many": ours(many)}, reset=reset, rounds=7)
    if seconds:
        benchmark.extra_info["rows"] = [
            {
                "N x V": WORKLOADS[0],
                "15 % supervised, seconds": seconds["ours"],
                "60 % supervised, seconds": seconds["many"],
                "ratio": seconds["ours"] / seconds["many"],
            }
        ]


def draw(tables: dict[str, list[dict[str, Any]]]) -> None:
    """docs/projection.png: time and memory of everyone, a bar each."""
    from matplotlib.figure import Figure

    rows = [row for group in tables.values() for row in group if "contestant" in row]
    figure = Figure(figsize=(9, 2.2 * len(WORKLOADS)), layout="constrained")
    axes = figure.subplots(len(WORKLOADS), 2, squeeze=False)
    for line, workload in zip(axes, WORKLOADS, strict=True):
        shown = [row for row in rows if row["N x V"] == workload][::-1]
        own = ("sadkern", "chunk_rows=176")
        colours = ["#c2410c" if row["contestant"] in own else "#94a3b8" for row in shown]
        for axis, key, form in zip(line, ("seconds", "extra MiB"), ("%.2f", "%.0f"), strict=True):
            present = [
                (row, colour) for row, colour in zip(shown, colours, strict=True) if key in row
            ]
            bars = axis.barh(
                [row["contestant"] for row, _ in present],
                [row[key] for row, _ in present],
                color=[colour for _, colour in present],
            )
            axis.bar_label(bars, fmt=form, padding=3, fontsize=8)
            axis.set_title(f"{key}, N x V = {workload}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.15)
            axis.tick_params(labelsize=8)
    figure.suptitle(
        f"forward KL from hidden states, 40 % supervised, fp32\n{hardware()}", fontsize=9
    )
    figure.savefig(ROOT / "docs" / "projection.png", dpi=150)
