"""From a file of trajectories to batches of rows."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from sadkern.spans import ACT, REASON, UNSUPERVISED, align, segment, windows
from sadkern.spans.files import read_lines
from sadkern.spans.record import render
from sadkern.spans.template import templated

logger = logging.getLogger(__name__)
INPUTS = ("input_ids", "attention_mask", "position_ids")  # what of a batch a model is given
NAMED = 10  # of many alike, so many are named in a warning


def load_trajectories(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file of JSON Lines, or of a JSON array, each one that `segment` takes.

    A line that is none is left out, and named by file and line in a warning: one for each fault,
    with the first lines that have it. ValueError: no line is left. FileNotFoundError: no such file.
    """
    records: list[dict[str, Any]] = []
    refused: defaultdict[str, list[int]] = defaultdict(list)
    for number, record, error in read_lines(path):
        fault = error or _fault(record)
        if fault:
            refused[fault].append(number)
        else:
            records.append(record)
    tell_left_out(path, refused)
    if not records:
        total = sum(map(len, refused.values()))
        raise ValueError(f"{path} has no trajectory ({total} lines were left out)")
    return records


def tell_left_out(path: str | Path, refused: Mapping[str, Sequence[int]]) -> None:
    """Warns of a file's lines by number, once for each fault."""
    for fault, numbers in refused.items():
        more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
        places = ", ".join(map(str, numbers[:NAMED])) + more
        logger.warning("%s:%s left out: %s", path, places, fault)


def _fault(record: Any) -> str:
    """Why a record is no trajectory, if it is none."""
    try:
        render(record).text.encode()  # half a surrogate pair ("\ud83d") is a ValueError
    except ValueError as error:
        return str(error)
    return ""


def prepare(
    records: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    profile: str = "auto",
    max_length: int | None = None,
    truncation: str = "right",
    supervise_markers: bool = False,
) -> list[dict[str, list[int]]]:
    """Segment and tokenise: `{"input_ids": [T], "span_ids": [T]}` of each trajectory, or of each of
    its windows where `truncation` is "split"; else that is as in `align`.

    Chats are written by the tokenizer's template if it has one. Trajectories in which nothing is
    supervised are left out; how many, and how many supervised tokens `max_length` cut, is logged.
    Records that have `input_ids` and `span_ids` are taken as they are. ValueError: nothing is left,
    or such a record does not hold together.
    """
    examples: list[dict[str, list[int]]] = []
    cut: Counter[int] = Counter()
    empty: list[str] = []
    warned: Counter[str] = Counter()
    writer = templated(tokenizer)
    if isinstance(records, str):
        raise ValueError(
            f"records is the text {records!r}: expected load_trajectories({records!r})"
        )
    records = list(records)
    bar = tqdm(records, desc="segmenting", leave=False, disable=len(records) == 1)
    for number, record in enumerate(bar):
        name = str(record.get("id", number) if isinstance(record, Mapping) else number)
        if "input_ids" in record:
            own = [_tokenised(record, name)]
        else:
            found = segment(record, profile, tokenizer=writer, supervise_markers=supervise_markers)
            warned.update(found.warnings if found.spans else ())
            if truncation == "split":
                made = windows(found, tokenizer, max_length)
            else:
                made = [align(found, tokenizer, max_length, truncation=truncation)]
            for one in made:
                cut.update(one.truncated)
            own = [{"input_ids": one.input_ids, "span_ids": one.span_ids} for one in made]
        supervised = [example for example in own if any(example["span_ids"])]
        examples += supervised
        if not supervised:
            empty.append(name)
    for said, count in warned.items():
        logger.warning("of %d trajectories: %s", count, said)
    if empty:
        logger.warning(
            "%d trajectories are left out, nothing in them is supervised: %s%s",
            len(empty), ", ".join(empty[:NAMED]), " ..." if len(empty) > NAMED else "",
        )  # fmt: skip
    if cut[REASON] or cut[ACT]:
        logger.warning(
            "max_length=%s cut %d REASON and %d ACT tokens", max_length, cut[REASON], cut[ACT]
        )
    if not examples:
        raise ValueError(
            f"no trajectory has a supervised token with profile={profile!r}: expected chats, or "
            "texts with lines such as 'Thought: ..' and 'Action: ..'; `sadkern inspect` shows them"
        )
    return examples


def _tokenised(record: Mapping[str, Any], name: str) -> dict[str, list[int]]:
    input_ids, span_ids = ([int(x) for x in record[key]] for key in ("input_ids", "span_ids"))
    if len(input_ids) != len(span_ids):
        raise ValueError(
            f"trajectory {name} has {len(input_ids)} input_ids and {len(span_ids)} span_ids: "
            "expected one span id for each token"
        )
    if not set(span_ids) <= {UNSUPERVISED, REASON, ACT}:
        raise ValueError(
            f"trajectory {name} has span_ids {sorted(set(span_ids))}: expected {UNSUPERVISED} (not "
            f"supervised), {REASON} (REASON) or {ACT} (ACT)"
        )
    if span_ids and span_ids[-1]:
        raise ValueError(
            f"trajectory {name} has span id {span_ids[-1]} at its last token, whose row predicts "
            "nothing: expected span_ids[p] to be the span of token p + 1, and the last one 0"
        )
    return {"input_ids": input_ids, "span_ids": span_ids}


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch a model's forward is given."""
    return {name: batch[name] for name in INPUTS if name in batch}


def trajectory_of(input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> Tensor:
    """`[B * T]`: which trajectory of the batch each row is of."""
    if position_ids is not None:
        return (position_ids.flatten() == 0).cumsum(0) - 1
    count, length = input_ids.shape
    return torch.arange(count, device=input_ids.device).repeat_interleave(length)


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """`[B, T]` int64: the token that each row predicts; -100 where its trajectory has ended."""
    ids = batch["input_ids"]
    return ids.roll(-1, 1).masked_fill(_ends(batch), -100)


def _ends(batch: Mapping[str, Tensor]) -> Tensor:
    """`[B, T]` bool: rows of a trajectory's last token, and of padding."""
    if "position_ids" in batch:
        ends = batch["position_ids"].roll(-1, 1) == 0
    else:
        ends = batch["attention_mask"].roll(-1, 1) == 0
    ends[:, -1] = True
    return ends


def sequence_part(batch: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """What one of several ranks that share every sequence (context parallelism) has of a batch: a
    stretch of each, of ceil(T / ranks) tokens.

    Beside what it is of, `labels`, the token that each row predicts, which may be the next rank's
    first; `position_ids`, those in the whole; and `num_tokens` [2], the supervised rows of the
    whole batch by kind, which `span_kl` divides by: what the ranks' losses and gradients then add
    up to are the whole batch's. (Where gradients are averaged over ranks, it takes num_tokens /
    ranks.) A rank whose stretch has nothing supervised, or nothing at all, is given that.

    >>> import torch
    >>> from sadkern.data import SpanCollator, sequence_part
    >>> batch = SpanCollator(0)([{"input_ids": [5, 6, 7, 8], "span_ids": [0, 1, 2, 0]}])
    >>> own = sequence_part(batch, 0, 2)
    >>> own["input_ids"].tolist(), own["labels"].tolist(), own["rows"].tolist()
    ([[5, 6]], [[6, 7]], [1])
    >>> own["num_tokens"].tolist()
    [1, 1]
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank={rank}: expected 0 to {ranks - 1}, there are {ranks} ranks")
    length = batch["input_ids"].shape[1]
    step = -(-length // ranks)
    whole = {name: batch[name] for name in (*INPUTS, "span_ids") if name in batch}
    positions = torch.arange(length, device=batch["input_ids"].device)
    whole.setdefault("position_ids", positions.expand_as(batch["input_ids"]))
    whole["labels"] = next_tokens(batch)
    part = {name: x[:, rank * step : (rank + 1) * step] for name, x in whole.items()}
    part["rows"] = part["span_ids"].flatten().nonzero().squeeze(-1)
    counts = [(batch["span_ids"] == kind).sum() for kind in (REASON, ACT)]
    return {**part, "num_tokens": torch.stack(counts)}


@dataclass
class SpanCollator:
    """A batch of trajectories: `input_ids`, `attention_mask`, `span_ids` [B, T], padded on the
    right, and `rows` [M], the supervised rows' places in the flattened [B * T]: found here, so that
    nobody waits for a device.

    packed: one behind the other, [1, T], without padding; `position_ids`, which begin anew with
    each, in place of `attention_mask`.
    """

    pad_token_id: int
    packed: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, spans = (
            [torch.as_tensor(example[name]) for example in examples]
            for name in ("input_ids", "span_ids")
        )
        if self.packed:
            batch = {
                "input_ids": torch.cat(ids)[None],
                "position_ids": torch.cat([torch.arange(len(x)) for x in ids])[None],
                "span_ids": torch.cat(spans)[None],
            }
        else:
            ones = [torch.ones_like(x) for x in ids]
            batch = {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
                "attention_mask": pad_sequence(ones, batch_first=True),
                "span_ids": pad_sequence(spans, batch_first=True),
            }
        batch["rows"] = batch["span_ids"].flatten().nonzero().squeeze(-1)
        if "difficulty" in examples[0]:
            batch["difficulty"] = torch.tensor([example["difficulty"] for example in examples])
        return batch
