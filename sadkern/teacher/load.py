"""Loading a teacher: where it stands, and in how many bits."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sadkern.data import SpanCollator, inputs_of
from sadkern.sides import Projection, moved
from sadkern.span_kl import span_kl
from sadkern.teacher.named import model_named
from sadkern.teacher.online import OnlineTeacher
from sadkern.teacher.source import Example

logger = logging.getLogger(__name__)
QUANTIZATIONS = ("8bit", "4bit")
SAMPLE = 16  # trajectories on which a quantised teacher is held against the whole one


def load_teacher(
    name: str,
    *,
    device: torch.device | str = "cpu",
    offload: bool = False,
    quantization: str | None = None,
    sample: Sequence[Example] = (),
    batch_size: int | None = None,
    dtype: str = "auto",
) -> OnlineTeacher:
    """The model `name` (a folder or a hub's name) as a teacher.

    Args:
        device: where it runs.
        offload: its weights stay in the host's memory, and each layer's come to `device` as it is
            needed (accelerate's cpu_offload).
        quantization: None, 8bit or 4bit (bitsandbytes). What that costs is measured on the first
            trajectories of `sample` and logged, as KL(whole || quantised) in nats a token; for
            that the whole model is loaded once, before.
        batch_size: as of `OnlineTeacher`.
        dtype: of its weights; "auto" is what they are saved in.

    ValueError: a setting that is none, or two that exclude each other.
    """
    name = model_named(name)
    if quantization is None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return OnlineTeacher(placed(model, device, offload), batch_size=batch_size)
    if quantization not in QUANTIZATIONS or offload:
        raise ValueError(
            f"quantization={quantization!r}, offload={offload}: expected None, "
            f"{', '.join(QUANTIZATIONS)}, and not both"
        )
    examples = list(sample)[:SAMPLE]
    whole = None
    if examples:
        teacher = load_teacher(name, device=device, batch_size=1, dtype=dtype)
        whole = moved(said(teacher, examples, device), torch.device("cpu"))
        del teacher
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if quantization == "8bit":
        settings: dict[str, Any] = {"load_in_8bit": True}
    else:
        compute = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        settings = {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute,
        }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings),
        device_map={"": torch.device(device)},
    )  # fmt: skip
    teacher = OnlineTeacher(model, batch_size=batch_size)
    if whole is not None:
        loss = quantization_loss(whole, said(teacher, examples, device))
        logger.warning(
            "teacher in %s: KL to the whole one is %.4f nats a token, and the most likely token "
            "the same for %.1f %%, over %d tokens of %d trajectories", quantization,
            loss["kl"], 100 * loss["agreement"], loss["tokens"], len(examples),
        )  # fmt: skip
    return teacher


def placed(model: nn.Module, device: torch.device | str, offload: bool = False) -> nn.Module:
    """`model` where it is to run; one that is spread over devices already is left as it is."""
    if getattr(model, "hf_device_map", None) is not None:
        return model
    if offload:
        return cpu_offload(model, torch.device(device))
    return model.to(device)


def said(
    teacher: OnlineTeacher, examples: Sequence[Example], device: torch.device | str
) -> Projection:
    """What `teacher` says of the supervised rows of `examples`."""
    batch = SpanCollator(0)(examples)
    inputs = {name: tensor.to(device) for name, tensor in inputs_of(batch).items()}
    return teacher(batch["rows"].to(device), **inputs)


def quantization_loss(whole: Projection, quantised: Projection) -> dict[str, float]:
    """kl: KL(whole || quantised), mean in nats a token; agreement: the share of tokens of which the
    most likely next one is the same; tokens: how many."""
    quantised = moved(quantised, whole.hidden.device)
    ones = torch.ones(len(whole.hidden), dtype=torch.int64)
    with torch.no_grad():
        out = span_kl(quantised, whole, ones, reduction="token_mean")
    return {
        "kl": out.loss.item(),
        "agreement": out.agreement.float().mean().item(),
        "tokens": len(ones),
    }
