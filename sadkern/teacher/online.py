"""A teacher in memory, run on each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from sadkern.forward import embeddings, head_projection, output_head, supervised_hidden
from sadkern.sides import Projection, vocabulary
from sadkern.teacher.heads import Heads
from sadkern.teacher.source import Example


class OnlineTeacher:
    """Runs a causal LM's backbone without gradient; its head is left to the loss, which makes the
    logits of a few rows at a time.

    The model is put into eval mode and frozen: nothing of it is ever trained. It may be anywhere:
    on the student's device, on another, spread over several or offloaded by accelerate; of what it
    says only hidden states `[M, D]` travel, and its head once.

    Args:
        model: a causal LM of transformers. ValueError: its head is not one that a `Projection`
            can stand for.
        batch_size: sequences that it runs at a time, where the student's batches are too large for
            it; None takes each batch as it comes.
    """

    def __init__(self, model: nn.Module, *, batch_size: int | None = None):
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected None or a positive number")
        self.model = model.eval().requires_grad_(False)
        self.batch_size = batch_size
        with align_module_device(output_head(model)):  # of an offloaded one the weight is brought
            head = head_projection(model)
            offloaded = hasattr(output_head(model), "_hf_hook")
            tensors = [head.weight, *([] if head.bias is None else [head.bias])]
            weight, *bias = [x.clone() if offloaded else x for x in tensors]
        self._heads = Heads(replace(head, weight=weight, bias=bias[0] if bias else None))

    @property
    def head(self) -> Projection:
        """What its logits are made with, of no rows."""
        return self._heads.own

    @property
    def embeddings(self) -> int:
        """How many tokens it has an embedding of."""
        return embeddings(self.model)

    def __call__(self, rows: Tensor, **inputs: Any) -> Projection:
        """See `TeacherSource`."""
        sequences, length = inputs["input_ids"].shape
        size = self.batch_size or max(sequences, 1)
        device = rows.device
        where = next((x.device for x in self.model.parameters() if not x.is_meta), device)
        begins = range(0, sequences, size)
        edges = torch.searchsorted(rows, torch.tensor([b * length for b in begins], device=device))
        ends = [*edges.tolist()[1:], len(rows)] if len(begins) > 1 else [len(rows)]
        hidden = []
        with torch.inference_mode():
            for begin, start, stop in zip(begins, [0, *ends], ends, strict=False):
                part = {name: x[begin : begin + size].to(where) for name, x in inputs.items()}
                own = rows[start:stop] - begin * length
                hidden.append(supervised_hidden(self.model, own, **part).to(device))
        return self._heads.of(torch.cat(hidden))

    def facts(self) -> dict[str, Any]:
        """Of the `Identity` of what it says."""
        return {
            "teacher": getattr(self.model, "name_or_path", None) or type(self.model).__name__,
            "revision": fingerprint(self.model),
            "vocab": vocabulary(self.head),
        }

    def expect(self, examples: Sequence[Example], *, tokenizer: Any, temperature: float) -> None:
        """ValueError: a token that it has no embedding of."""
        check_tokens(examples, self.embeddings, "teacher")


def check_tokens(examples: Sequence[Example], embeddings: int, whose: str) -> None:
    """ValueError: a token id is beyond the embeddings of the model `whose`."""
    largest = max((max(example["input_ids"]) for example in examples), default=0)
    if largest >= embeddings:
        raise ValueError(
            f"token id {largest} is beyond the {whose}'s {embeddings} embeddings: expected the "
            "tokenizer that student and teacher share"
        )


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights of a model, wherever they are; 16 hexadecimal digits."""
    weights, total = _weights(model), hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        while some := list(islice(weights, 16)):
            for digest in pool.map(lambda pair: _digest(*pair), some):
                total.update(digest)
    return total.hexdigest()[:16]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        with align_module_device(module):
            for name, tensor in module.named_parameters(recurse=False):
                yield f"{prefix}.{name} {tensor.dtype} {list(tensor.shape)}", tensor.detach().cpu()


def _digest(name: str, tensor: Tensor) -> bytes:
    content = hashlib.sha256(name.encode())
    content.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return content.digest()
