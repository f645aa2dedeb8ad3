"""What a run's models and trajectories become before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from accelerate.utils import gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel, Trainer

from sadkern.curriculum import difficulty
from sadkern.forward import head_projection, output_head
from sadkern.sides import Projection
from sadkern.spans import ACT, REASON
from sadkern.teacher import OnlineTeacher, TeacherSource, mean_entropies
from sadkern.train.config import SADConfig


def check_one_device(args: SADConfig) -> None:
    """ValueError: the Trainer would split batches among devices, `torch.nn.DataParallel`."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} devices, and rows cannot be split among them: "
            "expected one process per device (start with `accelerate launch` or torchrun), or "
            "one device (CUDA_VISIBLE_DEVICES=0)"
        )


def adapted(model: PreTrainedModel, peft_config: Any) -> Any:
    """With peft's adapters. ValueError: as of `peft`."""
    return peft().get_peft_model(model, peft_config)


def peft() -> Any:
    """The package. ValueError: it is not installed."""
    try:
        return import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"adapters need peft ({error}): expected `pip install 'sadkern[lora]'`"
        ) from None


def projection_of(model: nn.Module) -> Projection:
    """`head_projection`, or what to do where there is none."""
    try:
        return head_projection(model)
    except ValueError as error:
        raise ValueError(f"{error}. Or projection=False, which takes its logits whole") from None


def shard_teacher(teacher: TeacherSource, accelerator: Any) -> None:
    """Spreads an online teacher's layers over the ranks, as FSDP2 does the student's. Its head,
    which the loss needs whole, stays whole, and what is quantised or placed already stays there."""
    model: Any = teacher.model if isinstance(teacher, OnlineTeacher) else None
    placed = getattr(model, "hf_device_map", None) is not None
    if model is None or placed or any(x.is_meta for x in model.parameters()):
        return
    plugin = accelerator.state.fsdp_plugin
    ignored = plugin.ignored_modules
    plugin.ignored_modules = [output_head(model).to(accelerator.device)]
    try:
        fsdp2_prepare_model(accelerator, model)
    finally:
        plugin.ignored_modules = ignored


def forget_evaluation(trainer: Trainer) -> None:
    """Has the model be wrapped by `train` though `evaluate` came first.

    accelerate takes a model that it prepared for evaluation, unwrapped, as prepared for training
    too: no rank would hear of another's gradient.
    """
    model: Any = trainer.model
    wrapped = trainer.model_wrapped is not model
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.args.world_size > 1 and not wrapped and not sharded:
        # Without the autocast that it would else put around the forward a second time.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model._is_accelerate_prepared = False
        trainer.accelerator._models.clear()


def tell_difficulty(
    examples: Sequence[dict[str, Any]], teacher: TeacherSource, args: SADConfig
) -> None:
    """Writes into each example how hard it is. Each rank asks the teacher about its share, and all
    come to the same numbers."""
    reason, act = (
        [example["span_ids"].count(kind) for example in examples] for kind in (REASON, ACT)
    )
    entropy = None
    if args.curriculum_weights[2]:
        # As many each, since a teacher that is shared needs all ranks at once.
        share = range(args.process_index, len(examples) + args.process_index, args.world_size)
        own = mean_entropies(
            teacher, [examples[i % len(examples)] for i in share],
            batch_size=args.train_batch_size, device=args.device, temperature=args.temperature,
            progress=args.process_index == 0 and not args.disable_tqdm,
        )  # fmt: skip
        each = gather_object([own])
        entropy = [each[i % len(each)][i // len(each)] for i in range(len(examples))]
    found = difficulty(reason, act, entropy, weights=args.curriculum_weights)
    for example, hard in zip(examples, found, strict=True):
        example["difficulty"] = hard
