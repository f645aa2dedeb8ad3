"""What one can hold of a side: logits, what logits are made of, a teacher's likely tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Projection:
    """Logits that never exist as a whole: `softcap(scale (hidden weight^T + bias))`.

    What a language model's head does to the last hidden states; `softcap` c is c tanh(x / c), as
    Gemma has it, `scale` the logit scale of Cohere or, inverted, of Granite. Student and teacher
    each have their own D. hidden, weight and bias may differ in dtype; logits are taken in fp32
    (fp64 where one of them is fp64), and gradients come in the dtype of what they belong to.

    >>> import torch
    >>> from sadkern import Projection, span_kl
    >>> hidden, head = torch.eye(2, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    >>> out = span_kl(Projection(hidden, head), torch.zeros(2, 3), torch.tensor([1, 2]))
    >>> out.loss.item(), head.grad is None
    (0.0, True)
    >>> out.loss.backward()
    >>> head.grad.shape
    torch.Size([3, 2])
    """

    hidden: Tensor
    """[..., D] last hidden states, one per row"""
    weight: Tensor
    """[V, D] of the output head"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's likely tokens and their log-probabilities, as `topk_logprobs` and
    `sample_logprobs` give them, or a cache or a server.

    They are log-probabilities of the teacher's full distribution, at the temperature at which the
    student is to be compared. What is left out is the tail; `tail_mass` and `entropy`, if known,
    are those of the full distribution too.
    """

    ids: Tensor
    """[..., K] int32 or int64, distinct within a row; -1: no entry"""
    logprobs: Tensor
    """[..., K] natural logarithms"""
    tail_mass: Tensor | None = None
    """[...] probability of all other tokens; without it, what the K lack to 1"""
    entropy: Tensor | None = None
    """[...] in nats; without it, the entropy of what is given"""
    lse: Tensor | None = None
    """[...] log sum exp(logits / temperature): logprobs + lse are logits / temperature again"""


Side = Tensor | Projection | TopK
# A side as an operator takes it: its kind, its tensors, its numbers.
Packed = tuple[str, list[Tensor | None], list[float]]


def slots(side: Side) -> list[Tensor | None]:
    """Its tensors in the order in which it is packed and its gradients come, None where absent."""
    if isinstance(side, Projection):
        return [side.hidden, side.weight, side.bias]
    return list(vars(side).values()) if isinstance(side, TopK) else [side]


def pack(side: Side) -> Packed:
    """`side` for an operator, without its autograd history."""
    tensors = [None if x is None else x.detach() for x in slots(side)]
    if isinstance(side, Projection):
        return "projection", tensors, [float(side.scale), float(side.softcap or 0.0)]
    return "topk" if isinstance(side, TopK) else "logits", tensors, []


def part_of(side: TopK, rows: Tensor) -> TopK:
    """Those of its rows, flattened, that `rows` [M] names."""
    k = side.ids.shape[-1]
    per_row = (side.tail_mass, side.entropy, side.lse)
    return TopK(
        *(x.reshape(-1, k)[rows] for x in (side.ids, side.logprobs)),
        *(None if x is None else x.reshape(-1)[rows] for x in per_row),
    )


def each(side: Side, change: Callable[[Tensor], Tensor]) -> Any:
    """`side` with every tensor of it changed so."""
    if isinstance(side, Tensor):
        return change(side)
    changed = {name[1:]: change(tensor) for name, tensor in tensors_of(side).items()}
    return replace(side, **changed)  # type: ignore[arg-type]


def moved(side: Side, device: torch.device) -> Any:
    """`side` on `device`; itself where it is there."""
    if first_tensor(side).device == device:
        return side
    return each(side, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(side: Side) -> Any:
    """`side` with what is in the host's memory pinned: nobody waits for its copy to a device."""
    return each(side, lambda x: x.pin_memory() if x.device.type == "cpu" else x)


def unpack(kind: str, tensors: list[Tensor | None], numbers: list[float]) -> Side:
    """What `pack` was given."""
    if kind == "projection":
        hidden, weight, bias = tensors
        assert hidden is not None
        assert weight is not None
        return Projection(hidden, weight, bias, numbers[0], numbers[1] or None)
    if kind == "topk":
        ids, logprobs, *rest = tensors
        assert ids is not None
        assert logprobs is not None
        return TopK(ids, logprobs, *rest)
    logits = tensors[0]
    assert logits is not None
    return logits


def empty_topk(like: Tensor, sizes: torch.Size, k: int, dtype: torch.dtype) -> TopK:
    """A teacher's `k` tokens for rows of `sizes`, to be written, where `like` is."""
    return TopK(
        like.new_empty((*sizes, k), dtype=torch.int32),
        like.new_empty((*sizes, k), dtype=dtype),
        *(like.new_empty(sizes, dtype=dtype) for _ in range(3)),
    )


def rows_of(side: Side) -> torch.Size:
    """The leading shape, one row each."""
    if isinstance(side, Projection):
        return side.hidden.shape[:-1]
    return side.ids.shape[:-1] if isinstance(side, TopK) else side.shape[:-1]


def vocabulary(side: Tensor | Projection) -> int:
    """V."""
    return side.weight.shape[0] if isinstance(side, Projection) else side.shape[-1]


def common_vocabulary(student: Tensor | Projection, teacher: Side) -> int:
    """The V that both sides have: that of the student, or less where the teacher's is smaller."""
    own = vocabulary(student)
    return own if isinstance(teacher, TopK) else min(own, vocabulary(teacher))


def tensors_of(side: Side) -> dict[str, Tensor]:
    """Its tensors by the names a user knows them by, a dot before those of a field."""
    if isinstance(side, Tensor):
        return {"": side}
    return {f".{name}": x for name, x in vars(side).items() if isinstance(x, Tensor)}


def first_tensor(side: Side) -> Tensor:
    """Logits, hidden states or ids."""
    return next(iter(tensors_of(side).values()))


def precision(*sides: Side) -> torch.dtype:
    """In which logits of these sides are worked on: at least fp32."""
    wide = torch.float32
    for side in sides:
        if not isinstance(side, TopK):
            for tensor in tensors_of(side).values():
                wide = torch.promote_types(wide, tensor.dtype)
    return wide


def check(name: str, side: Side) -> None:
    """ValueError: `side`, which the user calls `name`, does not hold together."""
    if not isinstance(side, Tensor | Projection | TopK):
        kinds = "logits (a Tensor), a Projection or, for a teacher, a TopK"
        raise ValueError(f"{name} is a {type(side).__name__}, expected {kinds}")
    if isinstance(side, Projection):
        _check_projection(name, side)
    elif isinstance(side, TopK):
        _check_topk(name, side)
    else:
        _floating(name, side)
        if side.ndim == 0 or side.shape[-1] == 0:
            raise ValueError(f"{name} has shape {list(side.shape)}, expected [..., V] with V > 0")
    devices = {where: tensor.device for where, tensor in tensors_of(side).items()}
    first = next(iter(devices))
    for where, device in devices.items():
        if device != devices[first]:
            raise ValueError(
                f"{name}{where} is on {device}, expected {devices[first]} as {name}{first}"
            )


def _floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}, expected a Tensor")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected floating-point numbers")


def _shaped(name: str, tensor: Tensor, expected: list[int]) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")


def _check_projection(name: str, side: Projection) -> None:
    _floating(f"{name}.hidden", side.hidden)
    _floating(f"{name}.weight", side.weight)
    if side.hidden.ndim == 0:
        raise ValueError(f"{name}.hidden has shape [], expected [..., D]")
    width = side.hidden.shape[-1]
    if side.weight.ndim != 2 or side.weight.shape[1] != width or side.weight.shape[0] == 0:
        raise ValueError(
            f"{name}.weight has shape {list(side.weight.shape)}, expected {['V', width]}: "
            f"{name}.hidden is {list(side.hidden.shape)}"
        )
    if side.bias is not None:
        _floating(f"{name}.bias", side.bias)
        _shaped(f"{name}.bias", side.bias, [side.weight.shape[0]])
    if not 0 < abs(side.scale) < float("inf"):
        raise ValueError(f"{name}.scale={side.scale}: expected a finite number other than 0")
    if side.softcap is not None and not 0 < side.softcap < float("inf"):
        raise ValueError(f"{name}.softcap={side.softcap}: expected None or a positive number")


def _check_topk(name: str, side: TopK) -> None:
    if not isinstance(side.ids, Tensor) or side.ids.dtype not in (torch.int32, torch.int64):
        got = side.ids.dtype if isinstance(side.ids, Tensor) else f"a {type(side.ids).__name__}"
        raise ValueError(f"{name}.ids is {got}, expected a Tensor of torch.int32 or torch.int64")
    _floating(f"{name}.logprobs", side.logprobs)
    if side.ids.ndim == 0 or side.ids.shape[-1] == 0:
        raise ValueError(
            f"{name}.ids has shape {list(side.ids.shape)}, expected [..., K] with K > 0"
        )
    _shaped(f"{name}.logprobs", side.logprobs, list(side.ids.shape))
    for field in ("tail_mass", "entropy", "lse"):
        tensor = getattr(side, field)
        if tensor is not None:
            _floating(f"{name}.{field}", tensor)
            _shaped(f"{name}.{field}", tensor, list(side.ids.shape[:-1]))
