"""How uncertain a teacher is about a trajectory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sadkern.data import SpanCollator, inputs_of
from sadkern.sides import Side, TopK
from sadkern.teacher.cached import CachedTeacher
from sadkern.teacher.capture import whole
from sadkern.teacher.source import Example, TeacherSource
from sadkern.topk import topk_logprobs


def mean_entropies(
    source: TeacherSource,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    temperature: float = 1.0,
    progress: bool = True,
) -> list[float]:
    """H of equation (7): the teacher's mean entropy over each trajectory's supervised rows, nats.

    What a cache has kept is read there; all else is asked of `source`, which a cache that writes
    through keeps for training. NaN for a trajectory without a supervised row.
    """
    kept = source.mean_entropy if isinstance(source, CachedTeacher) else lambda _: None
    found = [kept(example) for example in examples]
    left = [i for i, known in enumerate(found) if known is None]
    left.sort(key=lambda i: -len(examples[i]["input_ids"]))  # of like length: little padding
    collate = SpanCollator(0)
    with tqdm(total=len(left), desc="teacher's entropy", disable=not (progress and left)) as bar:
        for begin in range(0, len(left), batch_size):
            some = left[begin : begin + batch_size]
            batch = {k: x.to(device) for k, x in collate([examples[i] for i in some]).items()}
            counts = (batch["span_ids"] != 0).sum(-1).tolist()
            signal = source(batch["rows"], **inputs_of(batch))
            for i, rows in zip(some, _entropy(signal, temperature).split(counts), strict=True):
                # Of what has just been kept as it was kept: a resumed run reads the same number.
                own = kept(examples[i])
                found[i] = rows.double().mean().item() if own is None else own
            bar.update(len(some))
    return [math.nan if mean is None else mean for mean in found]


def _entropy(side: Side, temperature: float) -> Tensor:
    if not isinstance(side, TopK):
        side = topk_logprobs(side, 1, temperature=temperature)
    entropy = whole(side).entropy
    assert entropy is not None
    return entropy
