"""A model's forward pass whose head sees the supervised rows only, or does not run at all.

The output head is the widest matrix of a small model and its logits the largest tensor of any: rows
that carry no loss are dropped before it, inside the model's own forward, so that what a model does
to its logits (softcap, scale) and what wraps it (DDP, FSDP) stays in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sadkern.sides import Projection

# By their heads, models in which a mask keeps packed trajectories apart; see `check_packs`.
_masked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def supervised_logits(model: nn.Module, rows: Tensor, **inputs: Any) -> Tensor:
    """Logits `[M, V]` of the rows `rows [M]` (indices into the flattened `[B * T]`).

    `model`: a causal LM of transformers, wrapped or not; `inputs` go to its forward.
    ValueError: a model without an output head, or one that calls it otherwise than once on
    `[B, T, D]`.
    """
    head = output_head(model)
    project = head.forward
    with _head_replaced(head, lambda hidden: project(_taken(hidden, rows))) as calls:
        logits = _run(model, inputs).logits
    if len(calls) != 1 or logits.shape[0] != rows.shape[0] or logits.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} called its head {len(calls)} times and gave logits "
            f"{list(logits.shape)}: expected one call and {[rows.shape[0], 'V']}"
        )
    return logits


def supervised_hidden(model: nn.Module, rows: Tensor, **inputs: Any) -> Tensor:
    """What the head would see of those rows: last hidden states `[M, D]`; it does not run.

    With `head_projection` these are the logits of `supervised_logits`. ValueError: as there.
    """
    with _head_replaced(output_head(model), lambda hidden: hidden[..., :0]) as calls:
        _run(model, inputs)
    _check_called_once(model, calls)
    return _taken(calls[0], rows)


def supervised_loss(
    model: nn.Module,
    rows: Tensor,
    loss_of: Callable[[Tensor | Projection], Tensor],
    projection: Projection | None,
    **inputs: Any,
) -> Tensor:
    """`loss_of` those rows: of their logits, or, with the model's `head_projection`, of hidden
    states beside the head's own weight, from where the head would run.

    It runs inside the model's forward then, where FSDP has the weight whole, and its gradient comes
    through what that forward returns, where DDP and FSDP look for it. ValueError: as of
    `supervised_logits`.
    """
    if projection is None:
        return loss_of(supervised_logits(model, rows, **inputs))
    head: Any = output_head(model)
    losses: list[Tensor] = []

    def by(hidden: Tensor) -> Tensor:
        own = _taken(hidden, rows), head.weight, getattr(head, "bias", None)
        losses.append(loss_of(Projection(*own, projection.scale, projection.softcap)))
        # Empty, and yet all that the loss depends on is behind it, head included.
        return hidden[..., :0] + losses[-1].to(hidden.dtype)

    with _head_replaced(head, by) as calls:
        nothing = _run(model, inputs).logits
    _check_called_once(model, calls)
    return losses[0] + nothing.sum()


def head_projection(model: nn.Module) -> Projection:
    """What `model` does to last hidden states, as a `Projection` of no rows `[0, D]`.

    Weight and bias are the head's own tensors. What the model does to their product is tried, not
    looked up: one token is run with numbers in the product's place. ValueError: that is something
    else than a scale and a softcap, or the head is no plain linear layer.
    """
    head, name = output_head(model), type(model).__name__
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    refuse = "expected one whose logits are softcap(scale (hidden weight^T + bias))"
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(f"the head of {name} is a {type(head).__name__}: {refuse}")
    own = {id(weight), id(bias)}
    extra = [n for n, x in head.named_parameters() if x.requires_grad and id(x) not in own]
    if extra:  # an adapter's, which does nothing yet
        raise ValueError(f"the head of {name} has {', '.join(extra)} beside its weight: {refuse}")
    # From where a cap bends nothing to where it is all that is left, on both sides.
    given = torch.logspace(-8, 6, 29, dtype=torch.float64)
    given = torch.cat([given, -given])
    with torch.no_grad():
        hidden = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device)
        hidden = hidden.view(2, -1).to(
            weight.dtype if weight.is_floating_point() else torch.float32
        )
        product = head(hidden).float()
        try:
            plain = nn.functional.linear(hidden, weight, bias).float()
        except RuntimeError:  # packed by a quantiser
            plain = torch.full_like(product, torch.nan)
        if not (product - plain).abs().max() <= 1e-2 * product.abs().max():
            raise ValueError(f"the head of {name} is no plain linear layer: {refuse}")
        with _head_replaced(head, lambda hidden: given.to(hidden.device).expand(1, 1, -1)):
            token = torch.zeros(1, 1, dtype=torch.int64, device=_device(model))
            made = _run(model, {"input_ids": token}).logits.flatten().double().cpu()
    scale, most = (made[0] / given[0]).item(), made.max().item()
    softcap = most if most < 0.99 * abs(scale) * given.max() else None
    expected = scale * given
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if not torch.allclose(made, expected, rtol=1e-3):
        raise ValueError(f"{name} changes its logits after the head: {refuse}")
    bias = None if bias is None else bias.detach()
    return Projection(hidden[:0], weight.detach(), bias, scale, softcap)


def check_packs(model: nn.Module) -> None:
    """Finds out how trajectories packed one behind the other are kept apart in `model`, which the
    functions above then do. ValueError: they see each other whatever is done.

    Tried, not looked up: most models do so where position_ids begin anew, others (OPT) need a mask
    of all pairs of tokens.
    """
    head, device = output_head(model), _device(model)
    positions = torch.tensor([[0, 1, 0, 1, 2]], device=device)
    ids = (torch.arange(10, device=device).view(2, 5) + 1) % embeddings(model)
    ids[1, 2:] = ids[0, 2:]  # two packs, of which the second trajectory is the same

    def hidden(ids: Tensor, **more: Tensor) -> Tensor:
        return supervised_hidden(model, torch.arange(ids.numel()), input_ids=ids, **more)[-3:]

    training = model.training
    model.eval()
    try:
        for masked in (False, True):
            _masked[head] = masked
            with torch.no_grad(), suppress(ValueError, TypeError, RuntimeError):
                first, second = (hidden(x[None], position_ids=positions) for x in ids)
                alone = hidden(ids[:1, 2:])
                # What stands before changes nothing at all, what it is changes the rounding.
                if torch.equal(first, second) and (
                    (first - alone).abs().max() <= 2e-2 * alone.abs().max()
                ):
                    return
    finally:
        model.train(training)
    raise ValueError(
        f"{type(model).__name__} lets packed trajectories see each other: expected a model that "
        "takes position_ids and attends within what they number, or padding_free=False"
    )


def _run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The model's forward; the only place where it is called."""
    positions = inputs.get("position_ids")
    if positions is not None and _masked.get(output_head(model), False):
        pack = (positions == 0).cumsum(-1)
        own = (pack[:, :, None] == pack[:, None]).tril()[:, None]
        if _unwrapped(model).config._attn_implementation == "eager":  # which adds it
            least = torch.finfo(torch.float32).min
            own = torch.zeros_like(own, dtype=torch.float32).masked_fill(~own, least)
        inputs = {**inputs, "attention_mask": own}
    return model(**inputs, use_cache=False)


def output_head(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits, found through any wrapper."""
    inner = _unwrapped(model)
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise ValueError(
            f"{type(inner).__name__} has no output head (get_output_embeddings gives None): "
            "expected a causal language model"
        )
    return head


def embeddings(model: nn.Module) -> int:
    """How many tokens it has an embedding of."""
    return _unwrapped(model).get_input_embeddings().num_embeddings


def _unwrapped(model: nn.Module) -> Any:
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    return model


def _check_called_once(model: nn.Module, calls: list[Tensor]) -> None:
    if len(calls) != 1:
        raise ValueError(
            f"{type(model).__name__} called its head {len(calls)} times: expected one call"
        )


def _taken(hidden: Tensor, rows: Tensor) -> Tensor:
    # A model spread over devices may have its head on another one than its inputs.
    return hidden.flatten(0, -2).index_select(0, rows.to(hidden.device))


def _device(model: nn.Module) -> torch.device:
    """Where its input goes."""
    return next((x.device for x in model.parameters() if not x.is_meta), torch.device("cpu"))


@contextmanager
def _head_replaced(head: nn.Module, by: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """In place of the head's own forward runs `by`; what it was called with is listed."""
    calls: list[Tensor] = []
    before = vars(head).get("forward")  # accelerate's hooks are put there too

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        calls.append(hidden)
        return by(hidden)

    head.forward = forward
    try:
        yield calls
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
