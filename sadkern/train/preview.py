"""What a run would do, before it does it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from sadkern.data import prepare
from sadkern.spans import ACT, REASON
from sadkern.train.arguments import ScriptArguments
from sadkern.train.config import SADConfig


def print_plan(
    script: ScriptArguments,
    args: SADConfig,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
) -> None:
    """A table of the resolved settings; no weight is loaded."""
    examples = prepare(records, tokenizer, **args.reading())
    table = Table(show_header=False, title="sadkern train, nothing is done yet")
    for name, told in _rows(script, args, examples):
        table.add_row(name, told)
    Console().print(table)


def _rows(
    script: ScriptArguments, args: SADConfig, examples: Sequence[Mapping[str, Sequence[int]]]
) -> list[tuple[str, str]]:
    tokens = sum(len(example["input_ids"]) for example in examples)
    reason, act = (
        sum(list(example["span_ids"]).count(kind) for example in examples) for kind in (REASON, ACT)
    )
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = math.ceil(len(examples) / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    return [
        ("student", f"{script.model_name_or_path}, {_size(script.model_name_or_path)}"),
        ("trained", _trained(script)),
        ("teacher", _teacher(script)),
        (
            "data",
            f"{len(examples)} trajectories, {tokens} tokens, at most {args.max_length} each "
            f"({args.truncation})",
        ),
        (
            "supervised",
            f"{reason} REASON (weight {args.reason_weight:g}), {act} ACT "
            f"(weight {args.act_weight:g}): {(reason + act) / tokens:.1%} of the tokens",
        ),
        (
            "loss",
            f"{args.divergence} at temperature {args.temperature:g}, segmentation "
            f"{args.segmentation}" + (f", {args.ce_weight:g} CE" if args.ce_weight else ""),
        ),
        (
            "batch",
            f"{args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
            f"{args.world_size} processes = {batch}, about {batch * tokens // len(examples)} tokens"
            + (", packed" if args.padding_free else ""),
        ),
        ("steps", f"{steps}, {per_epoch} an epoch"),
        (
            "curriculum",
            args.curriculum
            if args.curriculum == "none"
            else f"{args.curriculum} over {args.curriculum_epochs:g} epochs from "
            f"{args.curriculum_start:.0%}, weights {args.curriculum_weights}",
        ),
        (
            "optimizer",
            f"{_said(args.optim)}, lr {args.learning_rate:g} "
            f"({_said(args.lr_scheduler_type)}, {args.get_warmup_steps(steps)} steps of warm-up), "
            f"clip {args.max_grad_norm:g}"
            + (", in the backward pass" if args.optimizer_in_backward else ""),
        ),
        ("arithmetic", f"weights {script.dtype}, " + ("bf16" if args.bf16 else "as they are")),
        (
            "output",
            f"{args.output_dir}, saved every {args.save_steps:g} ({_said(args.save_strategy)})",
        ),
    ]


def _said(setting: Any) -> str:
    """As the command line has it, of a member of an enumeration too."""
    return str(getattr(setting, "value", setting))


def _trained(script: ScriptArguments) -> str:
    if not script.use_peft:
        return "all weights"
    return f"LoRA of rank {script.lora_r} on {', '.join(script.lora_target_modules)}"


def _teacher(script: ScriptArguments) -> str:
    if script.hard_labels:
        return "none: the trajectories' own tokens"
    parts = []
    if script.teacher_cache:
        parts.append(f"cache {script.teacher_cache}")
    if script.teacher_server:
        parts.append(f"{script.teacher_server_kind} at {script.teacher_server}")
    elif script.teacher_model_name_or_path:
        name = script.teacher_model_name_or_path
        parts.append(f"{name}, {_size(name)}")
    return ", what it lacks from ".join(parts)


def _size(name: str) -> str:
    """Of a model, from its config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    return f"{model.num_parameters() / 1e6:.2f}M parameters"
