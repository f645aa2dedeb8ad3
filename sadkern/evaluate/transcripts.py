"""Keys and values of transcripts, kept from turn to turn: only what is new is read."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer


class Read(NamedTuple):
    """tokens [T]; of each layer keys and values, [heads, T, width]."""

    tokens: list[int]
    layers: list[tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    """input_ids, attention_mask [rows, T], and what was read of them, which `generate` adds to."""

    input_ids: Tensor
    attention_mask: Tensor
    cache: DynamicCache | None


class Transcripts:
    """Of one model. Each is known by a name, and what of it is no longer as it was is read anew.

    Where a layer's state is no list of keys and values (a sliding window, a linear attention)
    nothing is kept, and every turn reads all.
    """

    def __init__(self, model: Any, padding: int):
        self.model, self.padding = model, padding
        # transformers renamed it in 5.24.
        names = inspect.signature(model.forward).parameters
        self._named = "cache" if "cache" in names else "past_key_values"
        layers = DynamicCache(config=model.config.get_text_config()).layers
        self.keeps = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
        self._read: dict[Hashable, Read] = {}

    def batch(self, prompts: Mapping[Hashable, Sequence[int]]) -> Batch:
        """Of the transcripts that go on; others are forgotten."""
        self._read = {name: self._same(name, prompt) for name, prompt in prompts.items()}
        fresh = {name: prompts[name][:-1] for name, read in self._read.items() if not read.tokens}
        if fresh and self.keeps and all(fresh.values()):
            batch = self._joined(fresh)
            with torch.inference_mode():
                positions = (batch.attention_mask.cumsum(1) - 1).clamp(0)
                self.model(
                    **self.inputs(batch), position_ids=positions, use_cache=True, logits_to_keep=1
                )
            self._keep(list(fresh), batch.input_ids, batch)
        return self._joined(prompts)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """As the model and its `generate` take them."""
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return given if batch.cache is None else {**given, self._named: batch.cache}

    def keep(self, batch: Batch, made: Tensor) -> None:
        """What `generate` made of `batch`, [rows, T + new], of which the last token is unread."""
        if self.keeps:
            self._keep(list(self._read), made[:, :-1], batch)

    def _same(self, name: Hashable, prompt: Sequence[int]) -> Read:
        """What was read of the beginning of `prompt`; its last token is left to be read."""
        tokens, layers = self._read.get(name, ((), []))
        pairs = zip(tokens, prompt[:-1], strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        same = min(len(tokens), len(prompt) - 1) if same is None else same
        return Read(list(tokens[:same]), [(k[:, :same], v[:, :same]) for k, v in layers])

    def _joined(self, prompts: Mapping[Hashable, Sequence[int]]) -> Batch:
        """Read tokens end in one column, and the others in the last one; between are holes."""
        read = [self._read[name] for name in prompts]
        past = max(len(one.tokens) for one in read)
        rest = max(
            len(prompt) - len(one.tokens)
            for prompt, one in zip(prompts.values(), read, strict=True)
        )
        ids = torch.full((len(prompts), past + rest), self.padding)
        mask = torch.zeros_like(ids)
        for row, (prompt, one) in enumerate(zip(prompts.values(), read, strict=True)):
            at = [*range(past - len(one.tokens), past)]
            at += range(past + rest - len(prompt) + len(one.tokens), past + rest)
            ids[row, at], mask[row, at] = torch.as_tensor(prompt), 1
        cache: Any = DynamicCache() if self.keeps else None
        for layer in range(len(read[0].layers) if past else 0):
            sides = (
                torch.stack([pad(x, (0, 0, past - x.shape[1], 0)) for x in side])
                for side in zip(*(one.layers[layer] for one in read), strict=True)
            )
            cache.update(*sides, layer)
        device = self.model.device
        return Batch(ids.to(device), mask.to(device), cache)

    def _keep(self, names: Sequence[Hashable], ids: Tensor, batch: Batch) -> None:
        more = ids.shape[1] - batch.input_ids.shape[1]
        mask = pad(batch.attention_mask, (0, more), value=1)
        cache: Any = batch.cache
        for row, name in enumerate(names):
            at = mask[row].nonzero().squeeze(1)
            layers = [(x.keys[row][:, at], x.values[row][:, at]) for x in cache.layers]
            self._read[name] = Read(ids[row, at].tolist(), layers)
