"""From a file of trajectories to batches of rows."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sadkern.spans import ACT, REASON, align, segment

logger = logging.getLogger(__name__)


def load_trajectories(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file, one trajectory a line, each with a "text".

    A line that is not such a record is named by file and line in a warning, and left out.
    ValueError: no line is left. FileNotFoundError: no such file.
    """
    records, refused = [], 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise ValueError('expected an object with a string "text"')
                records.append(record)
            except ValueError as error:
                refused += 1
                logger.warning("%s:%d is left out: %s", path, number, error)
    if not records:
        raise ValueError(f"{path} has no trajectory ({refused} lines were left out)")
    return records


def prepare(
    records: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    profile: str = "auto",
    max_length: int | None = None,
) -> list[dict[str, list[int]]]:
    """Segment and tokenise: `{"input_ids": [T], "span_ids": [T]}` of each trajectory.

    Trajectories in which nothing is supervised are left out; how many, and how many supervised
    tokens `max_length` cut, is logged. Records that have `input_ids` and `span_ids` pass as they
    are. ValueError: nothing is left.
    """
    examples: list[dict[str, list[int]]] = []
    cut: Counter[int] = Counter()
    empty: list[str] = []
    for number, record in enumerate(tqdm(list(records), desc="segmenting", leave=False)):
        if "input_ids" in record:
            examples.append({key: list(record[key]) for key in ("input_ids", "span_ids")})
            continue
        example = align(segment(record, profile), tokenizer, max_length)
        cut.update(example.truncated)
        if any(example.span_ids):
            examples.append({"input_ids": example.input_ids, "span_ids": example.span_ids})
        else:
            empty.append(str(record.get("id", number)))
    if empty:
        logger.warning(
            "%d trajectories are left out, nothing in them is supervised: %s%s",
            len(empty), ", ".join(empty[:5]), " ..." if len(empty) > 5 else "",
        )  # fmt: skip
    if cut[REASON] or cut[ACT]:
        logger.warning(
            "max_length=%s cut %d REASON and %d ACT tokens", max_length, cut[REASON], cut[ACT]
        )
    if not examples:
        raise ValueError(
            f"no trajectory has a supervised token with profile={profile!r}: expected texts with "
            "lines such as 'Reasoning: ..' and 'Action: ..', or 'Thought 1: ..' and 'Action 1: ..'"
        )
    return examples


@dataclass
class SpanCollator:
    """Pads a batch on the right: `input_ids`, `attention_mask`, `span_ids` [B, T], and `rows` [M],
    the supervised rows' places in the flattened [B * T]: found here, so that nobody waits for a
    device.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        input_ids = torch.full((len(examples), length), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        span_ids = torch.zeros_like(input_ids)
        for row, example in enumerate(examples):
            tokens = len(example["input_ids"])
            input_ids[row, :tokens] = torch.as_tensor(example["input_ids"])
            attention_mask[row, :tokens] = 1
            span_ids[row, :tokens] = torch.as_tensor(example["span_ids"])
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "span_ids": span_ids,
            "rows": span_ids.flatten().nonzero().squeeze(-1),
        }
