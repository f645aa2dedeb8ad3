"""Next-token prediction on whole episodes, as any language model is made: Muon for matrices, AdamW
for the rest, which takes half the steps that AdamW alone takes."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bench.reproduce.study import MUON_RATE, READ_AT_A_TIME
from sadkern.data import SpanCollator
from sadkern.files import write_whole

KEPT = 100  # every so many steps what there is is kept: a run that is killed goes on from there
SORTED = 64  # so many episodes are sorted by length
WARMUP, END = 30, 0.05  # steps until the whole rate, and what of it is left in the end


def read(
    model: Any, examples: Sequence[dict[str, Any]], steps: int, rate: float, kept: Path
) -> None:
    """Trains `model`; `rate` is AdamW's. `kept`: the file in which what is half done is found."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, x in model.named_parameters():
        (matrices if x.ndim == 2 and "embed" not in name else others).append(x)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, lr=MUON_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]  # fmt: skip

    def share(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * max(END, 1 - step / steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(one, share) for one in optimizers]
    parts: list[Any] = [model, *optimizers, *schedules]
    begin = 0
    if kept.exists():
        begin, states = torch.load(kept)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    model.train()
    bar = tqdm(range(begin, steps), desc="reading", initial=begin, total=steps)
    for step, batch in zip(bar, islice(_batches(examples), begin, None), strict=False):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one, schedule in zip(optimizers, schedules, strict=True):
            one.step()
            schedule.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % KEPT == 0:
            kept.parent.mkdir(parents=True, exist_ok=True)
            memory = io.BytesIO()
            torch.save((step + 1, [part.state_dict() for part in parts]), memory)
            write_whole(kept, memory.getvalue())


def _batches(examples: Sequence[dict[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
    """Of like length together, so that little is padding."""
    rng, pad = random.Random("reading"), SpanCollator(0)
    while True:
        order = rng.sample(range(len(examples)), len(examples))
        found = []
        for at in range(0, len(order), SORTED):
            some = sorted(order[at : at + SORTED], key=lambda i: len(examples[i]["input_ids"]))
            found += [some[i : i + READ_AT_A_TIME] for i in range(0, len(some), READ_AT_A_TIME)]
        rng.shuffle(found)
        for batch in found:
            yield pad([examples[i] for i in batch])
