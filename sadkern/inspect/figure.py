"""How long spans are, as the paper's Figure 8 shows it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from sadkern.inspect.overlay import COLOURS
from sadkern.inspect.survey import Survey
from sadkern.spans import ACT, REASON
from sadkern.spans.kinds import NAMES


def histograms(found: Survey) -> Any:
    """A matplotlib figure: a row for each environment, a column for REASON and one for ACT."""
    from matplotlib.figure import Figure

    groups = dict(sorted(found.environments.items())) or {"nothing": found.whole}
    figure = Figure(figsize=(9, 0.6 + 2.1 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for row, (name, group) in zip(axes, groups.items(), strict=True):
        for axis, kind in zip(row, (REASON, ACT), strict=True):
            lengths = group.lengths[kind]
            axis.hist(lengths, bins=_bins(lengths), color=COLOURS[kind], alpha=0.75)
            axis.set_title(f"{name}: {len(lengths):,} {NAMES[kind]} spans", fontsize=10, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_ylabel("spans")
    for axis in axes[-1]:
        axis.set_xlabel(f"length in {found.unit}")
    return figure


def _bins(lengths: list[int]) -> Any:
    """About 40 of them, each of as many whole numbers."""
    most = max(lengths, default=1)
    width = max(1, -(-most // 40))
    return range(0, most + width + 1, width)


def save_png(found: Survey, path: Path) -> None:
    histograms(found).savefig(path, dpi=150)


def svg(found: Survey) -> str:
    """For a page."""
    written = io.StringIO()
    histograms(found).savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue().partition("<svg")[1] + written.getvalue().partition("<svg")[2]
