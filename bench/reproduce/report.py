"""What came out: tables of all cells beside the paper's, and a picture as its Figure 2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.common import hardware, table, versions
from bench.reproduce import material, paper, tables
from bench.reproduce.study import (
    ABLATED,
    CELLS,
    KL,
    METHODS,
    METRICS,
    SEEDS,
    SIZES,
    STUDENT_STEPS,
    TABLE_3,
    TAUGHT_AT_A_TIME,
    Cell,
    Folder,
)
from sadkern.evaluate.agent import tokens_of
from sadkern.evaluate.episode import Episode, read
from sadkern.evaluate.metrics import Interval, Tokens, bootstrap, cot_match_rate
from sadkern.evaluate.script import LOG
from sadkern.files import write_json

RESULTS = Path(__file__).parent.parent / "results"


def per_game(episodes: Sequence[Episode], teacher: Sequence[Episode], tokens: Tokens) -> dict:
    """Of each metric a number a game."""
    return {
        one.task: {
            "success": 100.0 * one.success,
            "reasoning": float(one.thought_tokens),
            "CoT match": 100.0 * cot_match_rate([one], teacher, tokens).value,
            "steps": float(one.steps),
        }
        for one in episodes
    }


def over_games(seeds: Sequence[dict], metric: str) -> Interval:
    """Each game's mean over seeds; the interval is over games, which seeds share."""
    return bootstrap([np.mean([seed[game][metric] for seed in seeds]) for game in seeds[0]])


def difference(ours: Sequence[dict], theirs: Sequence[dict], metric: str) -> Interval:
    """Paired by game."""
    return bootstrap(
        [
            np.mean([seed[game][metric] for seed in ours])
            - np.mean([seed[game][metric] for seed in theirs])
            for game in ours[0]
        ]
    )


def means(games: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in games.values()])) for name in METRICS}


def kl_of(folder: Folder, cell: Cell) -> dict[str, float]:
    measured = json.loads((folder.cell(cell.name) / "measured.json").read_text())
    return {name: measured[key] for name, key in KL.items()}


def alike(folder: Folder, one: str, other: str) -> list[int]:
    """Of two ways' episodes, how many are the same word for word, and of how many."""
    same, total = 0, 0
    for first in (cell for cell in CELLS if cell.method == one):
        second = replace(first, method=other)
        if folder.done(first.name).exists() and folder.done(second.name).exists():
            theirs, ours = (
                {played.task: played for played in read([folder.cell(cell.name) / LOG])}
                for cell in (first, second)
            )
            same += sum(ours.get(task) == played for task, played in theirs.items())
            total += len(theirs)
    return [same, total]


def tell_cell(folder: Folder, name: str) -> None:
    """One cell's numbers, beside those that are kept in the results."""
    tokens = tokens_of(material.tokenizer_of(folder))
    own, teacher = (list(read([place / LOG])) for place in (folder.cell(name), folder.teacher))
    cell = next(cell for cell in CELLS if cell.name == name)
    ours = {**means(per_game(own, teacher, tokens)), **kl_of(folder, cell)}
    kept = RESULTS / "reproduce.json"
    theirs = json.loads(kept.read_text())["cells"].get(name, {}) if kept.exists() else {}
    rows = [
        [metric, f"{value:.6g}", f"{theirs[metric]:.6g}" if metric in theirs else ""]
        for metric, value in ours.items()
    ]
    told = table([name, "here", "in bench/results"], rows)
    Console().print("\n".join(told), markup=False)


def gathered(folder: Folder) -> dict[str, Any]:
    """Everything, as it is kept in JSON."""
    tokens = tokens_of(material.tokenizer_of(folder))
    teacher = list(read([folder.teacher / LOG]))

    def numbers(path: Path) -> dict:
        return per_game(list(read([path / LOG])), teacher, tokens)

    each_cell = {
        cell: numbers(folder.cell(cell.name)) for cell in CELLS if folder.done(cell.name).exists()
    }
    cells: dict[tuple[str, str], list[Cell]] = {}
    for cell in each_cell:
        cells.setdefault((cell.method, cell.size), []).append(cell)
    seeds = {row: [each_cell[cell] for cell in own] for row, own in cells.items()}

    def told(seeds: Sequence[dict]) -> dict[str, Any]:
        return {metric: over_games(seeds, metric)._asdict() for metric in METRICS}

    rows = {}
    for (method, size), own in cells.items():
        kl = [kl_of(folder, cell) for cell in own]
        rows[f"{method}-{size}"] = {
            **told(seeds[method, size]),
            **{name: float(np.mean([one[name] for one in kl])) for name in KL},
        }
    differences = {
        f"sad - {method}, {size}": {
            metric: difference(seeds["sad", size], theirs, metric)._asdict() for metric in METRICS
        }
        for (method, size), theirs in seeds.items()
        if method != "sad" and ("sad", size) in seeds
    }
    seconds = {
        done.stem: json.loads(done.read_text())["seconds"]
        for done in sorted(folder.done("x").parent.glob("*.json"))
    }
    return {
        "hardware": f"{hardware()} a job".replace("threads", "thread"),
        "versions": versions(),
        "games": {"tested": len(teacher), "names": sorted(one.task for one in teacher)},
        "seeds": list(SEEDS),
        "steps": STUDENT_STEPS,
        "episodes of a step": TAUGHT_AT_A_TIME,
        "parameters": {
            **{size: material.load(folder.base(size)).num_parameters() for size in SIZES},
            "teacher": material.load(folder.teacher).num_parameters(),
        },
        "teacher": told([numbers(folder.teacher)]),
        "bases": {size: told([numbers(folder.base(size))]) for size in SIZES},
        "rows": rows,
        "cells": {
            cell.name: {**means(games), **kl_of(folder, cell)} for cell, games in each_cell.items()
        },
        "differences": differences,
        "TRL's episodes that are those without segmentation": alike(folder, "peer", "flat"),
        "core hours": round(sum(seconds.values()) / 3600, 2),
        "seconds": seconds,
    }


def written(found: dict[str, Any]) -> str:
    """In Markdown."""
    parts = []
    for title, rows in (
        ("The run", tables.run),
        ("Table 3", tables.three),
        (f"Table 5 ({ABLATED})", tables.five),
        (f"Curriculum, and TRL ({ABLATED})", tables.more),
        ("Differences, game by game", tables.apart),
    ):
        head, *lines = rows(found)
        parts.append(f"## {title}\n\n" + "\n".join(table(head, lines)))
    return "\n\n".join(parts) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Above ours, below the paper's: a metric a column, methods over sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(12, 5.6), layout="constrained")
    colours = {"sad": "#c0392b", "token": "#4878a8", "hard": "#888888"}
    counts = [found["parameters"][size] / 1e3 for size in SIZES]
    attribute = dict(zip(METRICS, ("success", "reasoning", "cot", "steps"), strict=True))
    for metric, above, below in zip(METRICS, *axes, strict=True):
        for method in TABLE_3:
            own = [found["rows"].get(f"{method}-{size}", {}).get(metric) for size in SIZES]
            if all(own):
                values = [one["value"] for one in own]
                errors = [
                    [one["value"] - one["low"] for one in own],
                    [one["high"] - one["value"] for one in own],
                ]
                above.errorbar(
                    counts, values, errors, marker="o", capsize=3, color=colours[method],
                    label=METHODS[method][0].split(":")[0],
                )  # fmt: skip
            if method in paper.TABLE_3:
                values = [getattr(one, attribute[metric]) for one in paper.TABLE_3[method]]
                below.plot(list(paper.SIZES.values()), values, marker="o", color=colours[method])
        above.axhline(found["teacher"][metric]["value"], color="black", linestyle=":", linewidth=1)
        below.axhline(
            getattr(paper.TEACHER, attribute[metric]), color="black", linestyle=":", linewidth=1
        )
        above.set_title(metric, fontsize=10)
        above.set_xlabel("parameters, thousands", fontsize=8)
        below.set_xlabel("the paper: parameters, millions", fontsize=8)
        for axis, sizes in ((above, counts), (below, list(paper.SIZES.values()))):
            axis.set_xscale("log")
            axis.set_xticks(sizes, [f"{size:.0f}" for size in sizes], minor=False)
            axis.set_xticks([], minor=True)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def tell(folder: Folder, write: bool) -> None:
    found = gathered(folder)
    place = RESULTS if write else folder.root
    write_json(place / "reproduce.json", found)
    (place / "reproduce.md").write_text("# The paper at small scale\n\n" + written(found))
    plot(found, place / "reproduce.png")
    Console().print(written(found), highlight=False, markup=False)
    Console().print(f"{place}/reproduce.md, .json and .png", highlight=False)
