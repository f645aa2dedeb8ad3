"""A student beside its teacher on trajectories that neither was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sadkern.data import prepare
from sadkern.evaluate.episode import Episode
from sadkern.evaluate.metrics import cot_match
from sadkern.forward import supervised_logits
from sadkern.span_kl import SpanLoss, span_kl
from sadkern.spans import ACT, REASON
from sadkern.teacher.source import Example


@dataclass(frozen=True)
class Comparison:
    """`reason_kl`, `act_kl`: forward KL in nats per token. `action_accuracy`: the share of actions
    whose every token, stop included, is the student's most likely one, given the trajectory before
    it. `cot_match`: mean over thoughts, each continued greedily by both models from the
    trajectory before it."""

    reason_kl: float
    act_kl: float
    action_accuracy: float
    teacher_action_accuracy: float
    cot_match: float


def compare(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
) -> Comparison:
    """Measure `student` against `teacher` on `examples`. Both are left in eval mode."""
    student.eval()
    teacher.eval()
    kl = dict.fromkeys((REASON, ACT), 0.0)
    count = dict.fromkeys((REASON, ACT), 0)
    right, actions = [0, 0], 0
    with torch.inference_mode():
        for example in tqdm(examples, desc="comparing", leave=False):
            ids = torch.as_tensor(example["input_ids"], device=student.device)
            span_ids = torch.as_tensor(example["span_ids"], device=student.device)
            rows = span_ids.nonzero().squeeze(-1)
            out, both = _beside(student, teacher, ids, span_ids, rows)
            for kind in kl:
                kl[kind] += out.span_loss[kind - 1].item()
                count[kind] += int(out.span_count[kind - 1])
            acts = list(spans_of(example, ACT))
            actions += len(acts)
            for side, of_side in enumerate(both):
                hit = torch.zeros_like(span_ids, dtype=torch.bool)
                hit[rows] = of_side.argmax(-1) == ids[rows + 1]
                right[side] += sum(bool(hit[begin:end].all()) for begin, end in acts)
    thoughts = [
        (example["input_ids"][: begin + 1], example["input_ids"][end])
        for example in examples
        for begin, end in spans_of(example, REASON)
    ]
    stops = sorted({stop for _, stop in thoughts})
    contexts = [context for context, _ in thoughts]
    written = [
        list(continue_greedily(model, contexts, stops, batch_size, max_new_tokens))
        for model in (student, teacher)
    ]
    matches = [cot_match(*pair) for pair in zip(*written, strict=True)]
    return Comparison(
        reason_kl=kl[REASON] / max(count[REASON], 1),
        act_kl=kl[ACT] / max(count[ACT], 1),
        action_accuracy=right[0] / max(actions, 1),
        teacher_action_accuracy=right[1] / max(actions, 1),
        cot_match=sum(matches) / max(len(matches), 1),
    )


def kl_of_episode(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, episode: Episode
) -> dict[str, float]:
    """Forward KL in nats per token of each kind of span of what an agent did, "reason KL" and
    "act KL"; without those that it has none of. Both models in eval mode."""
    try:
        (example,) = prepare([{"text": episode.text}], tokenizer)
    except ValueError:  # nothing was said or done
        return {}
    with torch.inference_mode():
        ids = torch.as_tensor(example["input_ids"], device=student.device)
        span_ids = torch.as_tensor(example["span_ids"], device=student.device)
        out, _ = _beside(student, teacher, ids, span_ids, span_ids.nonzero().squeeze(-1))
    names = {"reason KL": REASON, "act KL": ACT}
    counts = {name: int(out.span_count[kind - 1]) for name, kind in names.items()}
    return {
        name: out.span_loss[names[name] - 1].item() / count
        for name, count in counts.items()
        if count
    }


def _beside(
    student: Any, teacher: Any, ids: Tensor, span_ids: Tensor, rows: Tensor
) -> tuple[SpanLoss, tuple[Tensor, Tensor]]:
    """Sums of KL by span, and both sides' logits of `rows`."""
    logits = supervised_logits(student, rows, input_ids=ids[None])
    theirs = supervised_logits(teacher, rows, input_ids=ids[None].to(teacher.device)).to(logits)
    return span_kl(logits, theirs, span_ids[rows], reduction="sum"), (logits, theirs)


def spans_of(example: Example, kind: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows [begin, end) of each span of `kind`; it is made of tokens begin + 1 to end."""
    for found, run in groupby(range(len(example["span_ids"])), key=example["span_ids"].__getitem__):
        rows = list(run)
        if found == kind:
            yield rows[0], rows[-1] + 1


def continue_greedily(
    model: Any,
    contexts: Sequence[Sequence[int]],
    stops: Sequence[int],
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[list[int]]:
    """What `model` writes after each context up to the first of `stops`, in the contexts' order."""
    # Of like length together, so that little is padding.
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    written: dict[int, list[int]] = {}
    batches = range(0, len(order), batch_size)
    for at in tqdm(batches, desc="writing thoughts", leave=False):
        chosen = order[at : at + batch_size]
        length = max(len(contexts[i]) for i in chosen)
        ids = torch.zeros(len(chosen), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, length - len(contexts[i]) :] = torch.as_tensor(contexts[i])
            mask[row, length - len(contexts[i]) :] = 1
        output: Tensor = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=stops[0],
        )
        for i, tokens in zip(chosen, output[:, length:].tolist(), strict=True):
            end = next((k for k, token in enumerate(tokens) if token in stops), len(tokens))
            written[i] = tokens[:end]
    return (written[i] for i in range(len(contexts)))
