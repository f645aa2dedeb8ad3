"""What a run is held against: the same trajectories with other segments, as in the paper's Table 5.

Supervision of one kind of span alone is `reason_weight=0` or `act_weight=0`; that of the
trajectory's own tokens, equation (13), is `sadkern.teacher.HardLabels` in the teacher's place.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import groupby

from sadkern.spans import ACT

SEGMENTATIONS = {
    "spans": "as they are",
    "flat": "the same tokens as one span, under one normaliser",
    "all": "every token, observations included, as one span: token-level distillation",
    "random": "spans of the same kinds and lengths in random places",
}


def resegmented(
    example: Mapping[str, Sequence[int]], segmentation: str, seed: int
) -> dict[str, list[int]]:
    """`example` with the span ids of that segmentation. Where it is "flat" they stay: what changes
    is the loss's normaliser."""
    spans = list(example["span_ids"])
    if segmentation == "all":
        # Observations count as ACT in what is logged.
        spans = [span or ACT for span in spans[:-1]] + [0]
    elif segmentation == "random":
        # Runs stay whole; each unsupervised token is one by itself, and all are shuffled. The last
        # row predicts nothing and stays.
        runs = [list(run) for _, run in groupby(spans[:-1])]
        pieces = [p for run in runs for p in ([run] if run[0] else [[x] for x in run])]
        random.Random(f"{seed} {list(example['input_ids'])}").shuffle(pieces)
        spans = [span for piece in pieces for span in piece] + [0]
    return {"input_ids": list(example["input_ids"]), "span_ids": spans}
