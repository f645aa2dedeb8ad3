"""The settings of a distillation run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from sadkern.curriculum import PACINGS, CurriculumSampler
from sadkern.span_kl import DIVERGENCES, span_kl
from sadkern.spans import PROFILES, segment
from sadkern.spans.align import TRUNCATIONS
from sadkern.train.segmentation import SEGMENTATIONS

AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 1,
    "learning_rate": 0,
    "teacher_lookahead": 0,
}


@dataclass
class SADConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what structured agent distillation adds to them.

    ValueError: a setting out of its range, told here rather than in the first step.
    """

    divergence: str = field(
        default="forward_kl",
        metadata={"help": f"Between teacher and student: one of {', '.join(DIVERGENCES)}."},
    )
    beta: float = field(
        default=0.5, metadata={"help": "Of jsd, as in TRL: 0 is forward, 1 reverse KL."}
    )
    skew: float = field(default=0.1, metadata={"help": "Of skew_forward_kl and skew_reverse_kl."})
    temperature: float = field(default=1.0, metadata={"help": "Divides both sides' logits."})
    reason_weight: float = field(
        default=1.0, metadata={"help": "Of the [REASON] spans' loss; 0 leaves them out."}
    )
    act_weight: float = field(
        default=1.0, metadata={"help": "Of the [ACT] spans' loss; 0 leaves them out."}
    )
    ce_weight: float = field(
        default=0.0, metadata={"help": "Of the cross-entropy to the trajectory's own tokens."}
    )
    max_length: int | None = field(
        default=512, metadata={"help": "Tokens of a trajectory that are kept; what is cut is told."}
    )
    truncation: str = field(
        default="right",
        metadata={
            "help": "Where max_length cuts: right, left, drop (the trajectory), or split (into "
            "windows of whole steps)."
        },
    )
    supervise_markers: bool = field(
        default=False,
        metadata={"help": "Whether 'Thought:', 'Action:' and the like are learnt too."},
    )
    profile: str = field(
        default="auto",
        metadata={
            "help": f"How trajectories are written: auto, {', '.join(PROFILES)} or a .yaml file."
        },
    )
    tail: str = field(
        default="bucket",
        metadata={
            "help": "Of a teacher of which the top k tokens are known: bucket (all others are one "
            "token), renormalize or none."
        },
    )
    segmentation: str = field(
        default="spans",
        metadata={
            "help": "For comparison: "
            + "; ".join(f"{name}, {said}" for name, said in SEGMENTATIONS.items())
        },
    )
    contrast_weight: float = field(
        default=0.0,
        metadata={
            "help": "Of the trajectory-level contrastive term between pooled REASON and ACT states."
        },
    )
    contrast_temperature: float = field(
        default=0.1, metadata={"help": "Of that term's similarities."}
    )
    curriculum: str = field(
        default="none",
        metadata={
            "help": "How fast harder trajectories are let in: none (all at once), "
            f"{', '.join(name for name in PACINGS if name != 'none')}."
        },
    )
    curriculum_epochs: float = field(
        default=1.0, metadata={"help": "Epochs until all trajectories are let in."}
    )
    curriculum_start: float = field(
        default=1 / 3, metadata={"help": "Share of the trajectories, the easiest, at the start."}
    )
    curriculum_weights: list[float] = field(
        default_factory=lambda: [1.0, 1.0, 1.0],
        metadata={
            "help": "What makes a trajectory hard: weights of its reasoning tokens, its action "
            "tokens and the teacher's entropy there."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Pack a batch's trajectories one behind the other in place of padding them; "
            "each attends to itself alone."
        },
    )
    optimizer_in_backward: bool = field(
        default=False,
        metadata={
            "help": "Update each weight as soon as its gradient is there, and drop that: all "
            "gradients never exist at once. Needs max_grad_norm 0 and no accumulation."
        },
    )
    projection: bool = field(
        default=True,
        metadata={
            "help": "Whether the loss is taken from the student's hidden states, so that its "
            "logits never exist as a whole; 'false' for a model whose head is no plain linear one."
        },
    )
    teacher_lookahead: int | None = field(
        default=None,
        metadata={
            "help": "Batches whose signal the teacher makes ahead, beside the student's step; 0: "
            "each when it is needed. Default: 1, or 0 where both would compute on the same CPU or "
            "share their weights among ranks (FSDP), whose messages have one order."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Stays False: batches carry spans beside a model's inputs."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint's folder, or 'last': the newest whole one in output_dir, the "
            "beginning where there is none, so that one command both starts and resumes."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for, which torch would say
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the spans from the batches: expected False"
            )
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name}={value}: expected {least} or more")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs}, max_steps={self.max_steps}: expected "
                "one of them above 0"
            )
        if self.segmentation not in SEGMENTATIONS:
            raise ValueError(
                f"segmentation={self.segmentation!r}: expected {', '.join(SEGMENTATIONS)}"
            )
        if self.contrast_weight and not (self.projection and self.contrast_temperature > 0):
            raise ValueError(
                f"contrast_weight={self.contrast_weight} is of hidden states: expected "
                f"projection=True (got {self.projection}) and contrast_temperature above 0 (got "
                f"{self.contrast_temperature})"
            )
        if len(self.curriculum_weights) != 3:
            raise ValueError(
                f"curriculum_weights={self.curriculum_weights}: expected three numbers, of "
                "reasoning, of actions and of the teacher's entropy"
            )
        if self.optimizer_in_backward and (
            self.max_grad_norm or self.gradient_accumulation_steps > 1 or self.world_size > 1
        ):
            raise ValueError(
                "optimizer_in_backward drops each gradient before the next is there: expected "
                f"max_grad_norm=0 (got {self.max_grad_norm}), gradient_accumulation_steps=1 (got "
                f"{self.gradient_accumulation_steps}) and one process (got {self.world_size})"
            )
        self.sampler([])
        # Their own checks, on a row of one logit and on an empty text.
        logits, row = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
        span_kl(logits, logits, row, labels=row, **self.loss_settings())
        segment("", self.profile)
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation={self.truncation!r}: expected {', '.join(TRUNCATIONS)}")

    def reading(self) -> dict[str, Any]:
        """What `prepare` is told of them."""
        return {
            "profile": self.profile,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "supervise_markers": self.supervise_markers,
        }

    def sampler(self, difficulties: Sequence[float]) -> CurriculumSampler:
        """The curriculum's."""
        return CurriculumSampler(
            difficulties,
            self.curriculum,
            epochs=self.curriculum_epochs,
            start=self.curriculum_start,
            seed=self.seed if self.data_seed is None else self.data_seed,
        )

    def loss_settings(self) -> dict[str, Any]:
        """What `span_kl` is told of them."""
        return {
            "span_weights": (self.reason_weight, self.act_weight),
            "divergence": self.divergence,
            "beta": self.beta,
            "skew": self.skew,
            "temperature": self.temperature,
            "ce_weight": self.ce_weight,
            "tail": self.tail,
            "reduction": "span_mean" if self.segmentation in ("spans", "random") else "token_mean",
        }
