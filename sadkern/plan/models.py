"""The paper's models, as their configs' numbers: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig


def _gpt2(width: int, layers: int, heads: int) -> GPT2Config:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, tie_word_embeddings=True)


def _opt(width: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        word_embed_proj_dim=width, tie_word_embeddings=True,
    )  # fmt: skip


def _llama(width: int, layers: int, heads: int, inner: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "gpt2-120m": _gpt2(768, 12, 12),
    "gpt2-340m": _gpt2(1024, 24, 16),
    "gpt2-760m": _gpt2(1280, 36, 20),
    "gpt2-1.5b": _gpt2(1600, 48, 25),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "llama-7b": _llama(4096, 32, 32, 11008),
    "llama-13b": _llama(5120, 40, 40, 13824),
}


def config_of(name: str) -> Any:
    """Of `MODELS`, or of a directory that has a config.json. ValueError: neither."""
    if name in MODELS:
        return MODELS[name]
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{name!r} is neither a known model nor a folder with a config.json: expected one of "
            f"{', '.join(MODELS)}, or a folder"
        )
    return AutoConfig.from_pretrained(name)


def empty_model(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal LM of that config, whose weights are nowhere if the default device is "meta"."""
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def shallow(config: Any, layers: int) -> Any:
    """The same with so many layers."""
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return type(config).from_dict({**config.to_dict(), name: layers})


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """What adapters and quantisers take: all of its matrices but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    kinds = ("Linear", "Conv1D")
    return [x for x in model.modules() if type(x).__name__ in kinds and x is not head]
