"""The settings of a distillation run."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from sadkern.span_kl import DIVERGENCES


@dataclass
class SADConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what structured agent distillation adds to them."""

    divergence: str = field(
        default="forward_kl",
        metadata={"help": f"Between teacher and student: one of {', '.join(DIVERGENCES)}."},
    )
    beta: float = field(
        default=0.5, metadata={"help": "Of jsd, as in TRL: 0 is forward, 1 reverse KL."}
    )
    skew: float = field(default=0.1, metadata={"help": "Of skew_forward_kl and skew_reverse_kl."})
    temperature: float = field(default=1.0, metadata={"help": "Divides both sides' logits."})
    reason_weight: float = field(default=1.0, metadata={"help": "Of the [REASON] spans' loss."})
    act_weight: float = field(default=1.0, metadata={"help": "Of the [ACT] spans' loss."})
    ce_weight: float = field(
        default=0.0, metadata={"help": "Of the cross-entropy to the trajectory's own tokens."}
    )
    max_length: int | None = field(
        default=512, metadata={"help": "Tokens of a trajectory that are kept; what is cut is told."}
    )
    profile: str = field(
        default="auto", metadata={"help": "How trajectories are written: paper, react or auto."}
    )
    # Both are how this trainer works rather than choices: its batches carry spans, not labels.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
