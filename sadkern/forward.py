"""A model's forward pass whose head sees the supervised rows only.

The output head is the widest matrix of a small model and its logits the largest tensor of any: rows
that carry no loss are dropped before it, inside the model's own forward, so that what a model does
to its logits (softcap, scale) and what wraps it (DDP, FSDP) stays in force.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def supervised_logits(model: nn.Module, rows: Tensor, **inputs: Any) -> Tensor:
    """Logits `[M, V]` of the rows `rows [M]` (indices into the flattened `[B * T]`).

    `model`: a causal LM of transformers, wrapped or not; `inputs` go to its forward.
    ValueError: a model without an output head, or one that calls it otherwise than once on
    `[B, T, D]`.
    """
    head = output_head(model)
    with _head_sees(head, rows) as calls:
        logits = model(**inputs, use_cache=False).logits
    if len(calls) != 1 or logits.shape[0] != rows.shape[0] or logits.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} called its head {len(calls)} times and gave logits "
            f"{list(logits.shape)}: expected one call and {[rows.shape[0], 'V']}"
        )
    return logits


def output_head(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits, found through any wrapper."""
    inner = model
    while not hasattr(inner, "get_output_embeddings") and hasattr(inner, "module"):
        inner = inner.module  # type: ignore[assignment]
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise ValueError(
            f"{type(inner).__name__} has no output head (get_output_embeddings gives None): "
            "expected a causal language model"
        )
    return head


@contextmanager
def _head_sees(head: nn.Module, rows: Tensor) -> Iterator[list[Tensor]]:
    calls: list[Tensor] = []

    def keep_rows(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        calls.append(rows)
        # A model spread over devices may have its head on another one than its inputs.
        return (hidden.flatten(0, -2).index_select(0, rows.to(hidden.device)), *rest)

    handle = head.register_forward_pre_hook(keep_rows)
    try:
        yield calls
    finally:
        handle.remove()
