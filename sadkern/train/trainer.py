"""`SADTrainer`: structured agent distillation on `transformers.Trainer`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput

from sadkern.data import SpanCollator, inputs_of, prepare, trajectory_of
from sadkern.forward import check_packs, embeddings, output_head, supervised_loss
from sadkern.sides import Projection, Side, first_tensor, moved
from sadkern.span_kl import SpanLoss, span_kl
from sadkern.teacher import OnlineTeacher, TeacherSource
from sadkern.teacher.ahead import SIGNAL, Ahead
from sadkern.teacher.load import placed
from sadkern.teacher.online import check_tokens
from sadkern.teacher.source import Expectant
from sadkern.train.config import SADConfig
from sadkern.train.contrast import span_contrast
from sadkern.train.in_backward import step_in_backward
from sadkern.train.meter import SPANS, Meter
from sadkern.train.progress import RichProgress
from sadkern.train.segmentation import resegmented
from sadkern.train.setup import (
    adapted,
    check_one_device,
    forget_evaluation,
    projection_of,
    shard_teacher,
    tell_difficulty,
)
from sadkern.train.stopping import Randomness, StopOnSignal, save_last_step

NOT_FINITE = (
    "expected finite logits of both models (a learning rate too high, or fp16 overflow, are the "
    "usual causes)"
)


class SADTrainer(Trainer):
    """Aligns `model` to `teacher_model` on the [REASON] and [ACT] spans of trajectories.

    Args:
        model: the student, a causal LM of transformers.
        teacher_model: a causal LM with the same tokenizer, which is frozen and put on the student's
            device, or with FSDP shared among ranks as the student is, unless it is spread over
            devices already; or any `TeacherSource`.
        args: a `SADConfig`.
        train_dataset: trajectories, each a mapping with a "text" (segmented and
            tokenised here) or with "input_ids" and "span_ids".
        eval_dataset: likewise.
        processing_class: the tokenizer; a fast one.
        peft_config: a `peft.LoraConfig` or the like: adapters are trained in place of the weights.

    Everything else is `transformers.Trainer`'s. Logged beside its own: the loss's parts `reason/kl`
    and `act/kl` (nats per token, of the divergence in use; with `ce_weight` also `reason/ce` and
    `act/ce`), `tokens`, `agreement` (same most likely token) and `entropy` (the teacher's) of both;
    `teacher_entropy`, `tail_mass`, `supervised_share`, `tokens_per_second`, `peak_memory_gb`. An
    evaluation gives the same with its prefix, over all its tokens. Gradients of accumulated
    micro-batches and of ranks add up to those of one big batch. A signal, and whatever is raised
    in a step, leaves a checkpoint of the last whole one. ValueError: models or data that do not
    fit. FloatingPointError: a divergence that is not finite.
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
        peft_config: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(args, SADConfig):
            raise ValueError(f"args is a {type(args).__name__}: expected a SADConfig")
        check_one_device(args)
        if teacher_model is model:
            raise ValueError(
                "the teacher is the student itself, and a teacher is frozen: expected another "
                "model, such as copy.deepcopy(model)"
            )
        if peft_config is not None:
            model = adapted(model, peft_config)
        output_head(model)
        self._projection = projection_of(model) if args.projection else None
        if isinstance(teacher_model, nn.Module):
            if not args.fsdp:
                teacher_model = placed(teacher_model, args.device)
            teacher_model = OnlineTeacher(teacher_model)
        self.teacher: TeacherSource = teacher_model
        if args.padding_free:
            check_packs(model)
            if isinstance(self.teacher, OnlineTeacher):
                check_packs(self.teacher.model)
        depth, online = args.teacher_lookahead, isinstance(self.teacher, OnlineTeacher)
        if depth is None:
            depth = int(not (online and (args.fsdp or args.device.type == "cpu")))
        if depth and online and args.fsdp:
            raise ValueError(
                f"teacher_lookahead={depth} with FSDP: expected 0, since a teacher that ranks "
                "share and the student beside it would send their messages in no order"
            )
        self._ahead = Ahead(self.teacher, depth)
        self._drawn: tuple[Any, Any] = (None, None)

        def examples(
            records: Iterable[Mapping[str, Any]] | None, segmentation: str = "spans"
        ) -> list[dict[str, Any]] | None:
            if records is None:
                return None
            ready: list[dict[str, Any]] = [
                resegmented(example, segmentation, args.seed)
                for example in prepare(records, processing_class, **args.reading())
            ]
            check_tokens(ready, embeddings(model), "student")
            if isinstance(self.teacher, Expectant):
                self.teacher.expect(ready, tokenizer=processing_class, temperature=args.temperature)
            return ready

        pad = getattr(processing_class, "pad_token_id", None)
        collator = SpanCollator(0 if pad is None else pad, packed=args.padding_free)
        kwargs.setdefault("data_collator", collator)
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples(train_dataset, args.segmentation),
            eval_dataset=examples(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_fsdp_enabled:
            shard_teacher(self.teacher, self.accelerator)
        # compute_loss divides by the counts of the whole accumulated batch itself. The second line
        # says so to versions of transformers that do not know the first.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._meters = {"train": Meter(), "eval": Meter()}
        self._before_step: Randomness | None = None
        self.stop, self.progress = StopOnSignal(), RichProgress()
        self.add_callback(self.stop)
        if self.pop_callback(ProgressCallback) is not None:  # there unless disable_tqdm
            self.add_callback(self.progress)
        if self.train_dataset is not None and args.curriculum != "none":
            prepared: Any = self.train_dataset
            tell_difficulty(prepared, self.teacher, args)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.curriculum == "none":
            return super()._get_train_sampler(train_dataset)
        examples: Any = self.train_dataset if train_dataset is None else train_dataset
        return self.args.sampler([example["difficulty"] for example in examples])

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.optimizer_in_backward:
            step_in_backward(optimizer)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        rows, span_ids, input_ids = inputs["rows"], inputs["span_ids"], inputs["input_ids"]
        made: Any = inputs.get(SIGNAL)
        teacher: Side = self._ahead(inputs) if made is None else made.result()
        kinds = span_ids.flatten()[rows]
        found: list[SpanLoss] = []
        extra: dict[str, Tensor] = {}

        def loss_of(student: Tensor | Projection) -> Tensor:
            theirs = moved(teacher, first_tensor(student).device)
            if isinstance(student, Tensor) and isinstance(theirs, Tensor):
                theirs = theirs.to(student.dtype)
            out = span_kl(
                student,
                theirs,
                kinds,
                rows=torch.arange(len(kinds), device=kinds.device),  # all: a device would be asked
                num_tokens=num_items_in_batch,
                # The last row of a trajectory is never supervised: row + 1 is the next token.
                labels=input_ids.flatten()[rows + 1] if self.args.ce_weight else None,
                # Nobody else needs the logits. A model that does for its own backward pass is told
                # by autograd, which sees that they were written to.
                inplace=isinstance(student, Tensor) and student.requires_grad,
                **self.args.loss_settings(),
            )
            found.append(out)
            if not self.args.contrast_weight or not isinstance(student, Projection):
                return out.loss
            term = span_contrast(
                student.hidden, kinds, trajectory_of(**inputs_of(inputs))[rows],
                self.args.contrast_temperature,
            )  # fmt: skip
            extra["contrast"] = term.detach()
            # A mean over the micro-batches of a step, as it is one over each one's trajectories.
            parts = self.current_gradient_accumulation_steps if model.training else 1
            return out.loss + self.args.contrast_weight * term / parts

        loss = supervised_loss(model, rows, loss_of, self._projection, **inputs_of(inputs))
        (out,) = found
        self._check_finite(out, inputs)
        mode = "train" if model.training else "eval"
        self._meters[mode].add(out, kinds, inputs, ce=bool(self.args.ce_weight), **extra)
        return (loss, out) if return_outputs else loss

    def _check_finite(self, out: SpanLoss, inputs: dict[str, Tensor]) -> None:
        # On a device the look would make the host wait; there the meter's sums tell, when logged.
        if out.per_token.device.type == "cpu" and not out.per_token.isfinite().all():
            row = inputs["rows"][~out.per_token.isfinite()][0]
            which = trajectory_of(**inputs_of(inputs))
            token = (which[:row] == which[row]).sum()
            raise FloatingPointError(
                f"step {self.state.global_step}: the divergence of trajectory {which[row]} of the "
                f"batch at token {token} is not finite: {NOT_FINITE}"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._meters["train"].begin()
        self._before_step = None
        forget_evaluation(self)
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            save_last_step(self, self._before_step, error)
            raise
        finally:
            self.stop.restore()
            self.progress.close()
            self._ahead.close()
            close = getattr(self.teacher, "close", None)
            if close is not None:
                close()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        # Where a step begins, and the Trainer draws its batches: the teacher is given those that
        # come next.
        self._before_step = Randomness()
        if self._ahead.depth:
            if self._drawn[0] is not epoch_iterator:
                self._ahead.close()
                self._drawn = epoch_iterator, self._ahead.over(epoch_iterator)
            epoch_iterator = self._drawn[1]
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Supervised rows [S] of a step, per rank: ranks' gradients are averaged."""
        if not batch_samples:
            return None
        counts = torch.stack(
            [sum((batch["span_ids"] == kind).sum() for batch in batch_samples) for kind in SPANS]
        ).to(device)
        ranks = self.args.world_size
        if ranks > 1:
            # A step's one message between ranks beside its gradient: signals go along.
            told = torch.cat([counts, counts.new_tensor([self.stop.received or 0])])
            each = self.accelerator.gather(told).view(ranks, -1)
            counts, self.stop.heard = each[:, :-1].sum(0), each[:, -1].max()
        if self.args.loss_settings()["reduction"] == "token_mean":
            counts = counts.sum(0, keepdim=True)
        return counts / ranks

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        ends = self.accelerator.gradient_state
        if self.args.world_size > 1 and ends.end_of_dataloader and ends.remainder > 0:
            # Ranks' last batches are filled up with trajectories that another one has already.
            own = ends.remainder - self.args.process_index * self.args.eval_batch_size
            rows = inputs["rows"]
            inputs = {**inputs, "rows": rows[trajectory_of(**inputs_of(inputs))[rows] < own]}
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._meters["eval"] = Meter()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        measured = self._measured("eval")
        # The loss over all tokens: the mean of the batches' own would depend on how they were cut.
        weights = {"reason": self.args.reason_weight, "act": self.args.act_weight}
        if self.args.loss_settings()["reduction"] == "token_mean":
            rows = sum(measured[f"{name}/tokens"] for name in weights)
            weights = {k: w * measured[f"{k}/tokens"] / rows for k, w in weights.items()}
        measured["loss"] = sum(
            weight * measured.get(f"{name}/kl", 0.0)
            + weight * self.args.ce_weight * measured.get(f"{name}/ce", 0.0)
            for name, weight in weights.items()
        )
        named = {f"{metric_key_prefix}_{key}": value for key, value in measured.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # "train_loss" is the summary at the end, which takes the steps since the last log.
        if "loss" in logs or "train_loss" in logs:
            logs = {**logs, **self._measured("train")}
        super().log(logs, start_time)

    def _measured(self, mode: str) -> dict[str, float]:
        measured = self._meters[mode].drain(self.accelerator)
        wrong = [key for key, value in measured.items() if not math.isfinite(value)]
        if wrong:
            raise FloatingPointError(
                f"{', '.join(wrong)} not finite in the {mode} batches up to step "
                f"{self.state.global_step}: {NOT_FINITE}"
            )
        return measured
