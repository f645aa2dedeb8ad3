"""The same step of distillation with another loss in place of sadkern's, all else alike: of whole
logits as one would write it in PyTorch, and by the functions of TRL and Liger. For
`sadkern.plan.track`, on tensors without contents: what needs some is stood in for, as it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from sadkern.data import SpanCollator, inputs_of
from sadkern.forward import output_head, supervised_hidden
from sadkern.plan.track import Step, finish_step


def eager(made: Any, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """KL in fp32 of logits of all tokens; of a cached teacher, of its likeliest."""
    ours = _logits(model, batch).float().log_softmax(-1)
    teacher = getattr(made.teacher, "model", None)
    if teacher is None:
        likely = made.teacher(torch.zeros(batch["input_ids"].numel(), dtype=torch.int64))
        known = ours.flatten(0, 1).gather(-1, likely.ids.long())
        return -(likely.logprobs.exp() * known).sum(-1).mean()
    with torch.no_grad():
        theirs = _logits(teacher, batch).float().log_softmax(-1)
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


def gkd_collator(pad_token: int) -> Callable[[list[Any]], dict[str, Tensor]]:
    """Batches for TRL's GKDTrainer of examples as `prepare` makes them: what is supervised here has
    a label there."""
    pad = SpanCollator(pad_token)

    def collate(examples: list[Any]) -> dict[str, Tensor]:
        batch = pad(examples)
        labels = torch.full_like(batch["input_ids"], -100)
        member = batch["span_ids"][:, :-1] != 0  # of rows; labels are of tokens
        labels[:, 1:][member] = batch["input_ids"][:, 1:][member]
        return {**inputs_of(batch), "labels": labels}

    return collate


def gkd(made: Any, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """TRL's experimental GKDTrainer."""
    from trl.experimental.gkd import GKDTrainer

    ours = _logits(model, batch)
    with torch.no_grad():
        theirs = _logits(made.teacher.model, batch)
    return GKDTrainer.generalized_jsd_loss(ours[:, :-1], theirs[:, :-1], beta=0.5)


def stable(made: Any, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """TRL's DistillationTrainer: its chunked divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head, theirs = _hidden(made, model, batch)
    both = hidden, head, None, theirs.hidden, theirs.weight, None
    return ChunkedDivergenceFunction.apply(*both, 0.5)[0].sum()


def liger(made: Any, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Liger's fused linear JSD, not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    hidden, head, theirs = _hidden(made, model, batch)
    return loss_of(hidden, head, theirs.hidden, theirs.weight, batch["input_ids"].flatten())


LOSSES = {"eager logits": eager, "TRL GKD": gkd, "TRL stable": stable, "Liger": liger}


def step_of(name: str) -> Step:
    """A training step with that one of `LOSSES`."""

    def step(made: Any, model: Any, batch: dict[str, Tensor]) -> None:
        with ExitStack() as stack:
            if name == "TRL stable":
                _without_kernels(stack)
            loss = LOSSES[name](made, model, batch)
            if name == "Liger":  # asks whether its gradient is another number than 1
                stack.enter_context(patch.object(torch, "ne", lambda *_: False))
            loss.backward()
        finish_step(made, model)

    return step


def _without_kernels(stack: ExitStack) -> None:
    from trl.kernels import chunked_divergence

    class Kernel:
        def __getitem__(self, _: Any) -> Callable[..., None]:
            return lambda *_, **__: None

    kernels = ("_stats_kernel", "_jsd_kernel", "_backward_kernel")
    stand_ins: dict[str, Any] = dict.fromkeys(kernels, Kernel())
    stand_ins |= {"_use_triton": lambda _: True, "_project": lambda *_: None}
    stand_ins["_addmm_fp32"] = lambda out, *_: out.zero_()
    for name, value in stand_ins.items():
        stack.enter_context(patch.object(chunked_divergence, name, value))


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**inputs_of(batch), use_cache=False).logits


def _hidden(made: Any, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    rows, inputs = batch["rows"], inputs_of(batch)
    theirs = made.teacher(rows, **inputs)
    head: Any = output_head(model)
    return supervised_hidden(model, rows, **inputs), head.weight, theirs
