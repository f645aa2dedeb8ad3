"""`SADTrainer`: structured agent distillation on `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from sadkern.forward import output_head, supervised_logits
from sadkern.span_kl import SpanLoss, span_kl
from sadkern.spans import ACT, REASON
from sadkern.teacher import OnlineTeacher, TeacherSource
from sadkern.train.config import SADConfig
from sadkern.train.data import SpanCollator, prepare

SPANS = {REASON: "reason", ACT: "act"}


class SADTrainer(Trainer):
    """Aligns `model` to `teacher_model` on the [REASON] and [ACT] spans of trajectories.

    Args:
        model: the student, a causal LM of transformers.
        teacher_model: a causal LM with the same tokenizer, or any `TeacherSource`.
        args: a `SADConfig`.
        train_dataset, eval_dataset: trajectories, each a mapping with a "text" (segmented and
            tokenised here) or with "input_ids" and "span_ids".
        processing_class: the tokenizer; a fast one.

    Everything else is `transformers.Trainer`'s. Logged beside its own: the loss's parts `reason/kl`
    and `act/kl` (nats per token, of the divergence in use), `reason/tokens`, `act/tokens`,
    `reason/agreement`, `act/agreement` (same most likely token) and `teacher_entropy`. Gradients of
    accumulated micro-batches and of ranks add up to those of one big batch.
    """

    args: SADConfig

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel | TeacherSource,
        args: SADConfig,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        output_head(model)
        vocab = model.get_input_embeddings().num_embeddings
        if isinstance(teacher_model, nn.Module):
            vocab = min(vocab, teacher_model.get_input_embeddings().num_embeddings)
            self.teacher: TeacherSource = OnlineTeacher(teacher_model.to(args.device))
        else:
            self.teacher = teacher_model

        def examples(
            records: Iterable[Mapping[str, Any]] | None,
        ) -> list[dict[str, list[int]]] | None:
            if records is None:
                return None
            ready = prepare(
                records, processing_class, profile=args.profile, max_length=args.max_length
            )
            largest = max(max(example["input_ids"]) for example in ready)
            if largest >= vocab:
                raise ValueError(
                    f"token id {largest} is beyond the models' {vocab} embeddings: "
                    "expected the tokenizer that student and teacher share"
                )
            return ready

        pad = getattr(processing_class, "pad_token_id", None)
        kwargs.setdefault("data_collator", SpanCollator(0 if pad is None else pad))
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples(train_dataset),
            eval_dataset=examples(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        # compute_loss divides by the counts of the whole accumulated batch itself.
        self.loss_is_scaled_for_ga = True
        self._meters = {"train": Meter(), "eval": Meter()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        rows, span_ids, input_ids = inputs["rows"], inputs["span_ids"], inputs["input_ids"]
        forward = {"input_ids": input_ids, "attention_mask": inputs["attention_mask"]}
        teacher = self.teacher(rows, **forward)
        student = supervised_logits(model, rows, **forward)
        out = span_kl(
            student,
            teacher.to(student.dtype),
            span_ids.flatten()[rows],
            span_weights=(self.args.reason_weight, self.args.act_weight),
            divergence=self.args.divergence,
            beta=self.args.beta,
            skew=self.args.skew,
            temperature=self.args.temperature,
            num_tokens=num_items_in_batch,
            # The last row of a trajectory is never supervised, so row + 1 is the next token.
            labels=input_ids.flatten()[rows + 1] if self.args.ce_weight else None,
            ce_weight=self.args.ce_weight,
        )
        self._check_finite(out, rows, input_ids.shape[1])
        mode = "train" if model.training else "eval"
        self._meters[mode].add(out, span_ids.flatten()[rows])
        return (out.loss, out) if return_outputs else out.loss

    def _check_finite(self, out: SpanLoss, rows: Tensor, length: int) -> None:
        # On a device the look would make the host wait; there the meter's sums tell, when logged.
        if out.per_token.device.type == "cpu" and not out.per_token.isfinite().all():
            row = rows[~out.per_token.isfinite()][0].item()
            raise FloatingPointError(
                f"step {self.state.global_step}: the divergence of trajectory {row // length} of "
                f"the batch at token {row % length} is not finite: expected finite logits of both "
                "models (a learning rate too high, or fp16 overflow, are the usual causes)"
            )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Supervised rows [S] of a step, per rank: ranks' gradients are averaged."""
        if not batch_samples:
            return None
        counts = torch.stack(
            [sum((batch["span_ids"] == kind).sum() for batch in batch_samples) for kind in SPANS]
        ).to(device)
        ranks = self.args.world_size
        if ranks > 1:
            counts = self.accelerator.gather(counts).view(ranks, -1).sum(0)
        return counts / ranks

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        measured = self._meters[mode].drain(self.accelerator)
        super().log(
            {**logs, **{prefix + key: value for key, value in measured.items()}}, start_time
        )


class Meter:
    """Sums over supervised rows since the last log; they stay on the device until then."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, out: SpanLoss, span_ids: Tensor) -> None:
        for kind, name in SPANS.items():
            member = span_ids == kind
            self._sum(f"{name}/tokens", member)
            self._sum(f"{name}/kl", torch.where(member, out.per_token, 0))
            self._sum(f"{name}/agreement", member & out.agreement)
        self._sum("teacher_entropy", out.teacher_entropy)

    def _sum(self, name: str, values: Tensor) -> None:
        total = values.sum(dtype=torch.float32)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Means per token over all ranks, and the counts; empty where nothing was added."""
        if not self.sums:
            return {}
        names = list(self.sums)
        totals = accelerator.reduce(torch.stack([self.sums[name] for name in names]))
        found = dict(zip(names, totals.tolist(), strict=True))
        self.sums = {}
        measured: dict[str, float] = {}
        for name in SPANS.values():
            count = found[f"{name}/tokens"]
            measured[f"{name}/tokens"] = count
            for key in (f"{name}/kl", f"{name}/agreement"):
                if count:
                    measured[key] = found[key] / count
        rows = sum(found[f"{name}/tokens"] for name in SPANS.values())
        measured["teacher_entropy"] = found["teacher_entropy"] / max(rows, 1)
        return measured
