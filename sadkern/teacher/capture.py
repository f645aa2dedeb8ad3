"""A teacher's signal to columns of a store and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from sadkern.sides import Projection, Side, TopK, each, first_tensor
from sadkern.store import DamagedError, Identity, Store, content_key
from sadkern.store.codec import (
    Columns,
    decode_hidden,
    decode_topk,
    encode_hidden,
    encode_topk,
    take,
)
from sadkern.store.shard import checked
from sadkern.teacher.source import Example
from sadkern.topk import sample_logprobs, topk_logprobs


class Asked(NamedTuple):
    """What is asked of one trajectory."""

    key: bytes
    input_ids: Sequence[int] | np.ndarray
    positions: np.ndarray
    """of its supervised rows"""

    @classmethod
    def of(cls, input_ids: Sequence[int] | np.ndarray, positions: np.ndarray) -> Asked:
        return cls(content_key(input_ids), input_ids, positions)

    @classmethod
    def of_example(cls, example: Example) -> Asked:
        """All of its supervised rows."""
        return cls.of(example["input_ids"], np.flatnonzero(example["span_ids"]))

    @property
    def seed(self) -> int:
        """Of what is drawn for it."""
        return int.from_bytes(self.key[:7], "big")


def encode(signal: Side, asked: Asked, identity: Identity) -> Columns:
    """Columns of a trajectory's M rows: what `identity` says of `signal`, and of each row its
    position, the teacher's entropy and its log-probability of the actual next token.

    signal: logits, a `Projection` or a `TopK` of M rows. What is drawn depends on the trajectory
    alone. ValueError: the signal cannot serve that mode.
    """
    columns: Columns = {"position": asked.positions.astype(np.int32)}
    labels = torch.as_tensor(asked.input_ids)[torch.from_numpy(asked.positions) + 1]
    labels = labels.to(first_tensor(signal).device)
    if isinstance(signal, TopK):
        if identity.mode != "topk":
            raise ValueError(
                f"mode={identity.mode!r} needs the teacher's hidden states or logits, and this one "
                "gives its likely tokens alone: expected mode='topk'"
            )
        found, of_labels = whole(signal), _entry(signal, labels)
    elif identity.mode == "hidden":
        if not isinstance(signal, Projection):
            raise ValueError("mode='hidden' needs a teacher that gives a Projection, not logits")
        found = topk_logprobs(signal, 1)
        of_labels = _label_logprobs(signal, labels, found, 1.0)
        columns.update(encode_hidden(signal.hidden.float().cpu().numpy()))
        columns["entropy"] = _numpy(found.entropy)
    else:
        k = 1 if identity.k is None else identity.k
        temperature = 1.0 if identity.temperature is None else identity.temperature
        if identity.mode == "topk":
            found = topk_logprobs(signal, k, temperature=temperature)
        else:
            found = sample_logprobs(signal, k, temperature=temperature, seed=asked.seed)
        of_labels = _label_logprobs(signal, labels, found, temperature)
    columns["label_logprob"] = _numpy(of_labels)
    if identity.mode != "hidden":
        tail = torch.zeros_like(of_labels) if identity.mode == "sampled" else found.tail_mass
        columns |= encode_topk(
            found.ids.cpu().numpy(), _numpy(found.logprobs), _numpy(tail), _numpy(found.entropy),
            identity.vocab,
        )  # fmt: skip
    return columns


def between(signal: Side, begin: int, end: int) -> Side:
    """Rows `begin` to `end` of M."""
    if isinstance(signal, Projection):
        return replace(signal, hidden=signal.hidden[begin:end])
    return each(signal, lambda tensor: tensor[begin:end])


def decode(columns: Columns, identity: Identity) -> Tensor | TopK:
    """What all rows of `columns` say, on the CPU: hidden states fp32 `[R, D]`, or a `TopK`."""
    if identity.mode == "hidden":
        return torch.from_numpy(decode_hidden(columns))
    ids, logprobs, tail = decode_topk(columns, identity.vocab)
    entropy = torch.from_numpy(columns["entropy"].copy())
    return TopK(torch.from_numpy(ids), torch.from_numpy(logprobs), torch.from_numpy(tail), entropy)


def at_positions(columns: Columns, positions: np.ndarray, identity: Identity) -> Columns | None:
    """Those rows of a trajectory's columns; None: one of them is not among them."""
    have = columns["position"]
    if np.array_equal(have, positions):
        return columns
    kept = np.isin(have, positions)
    return take(columns, kept, identity.vocab) if kept.sum() == len(positions) else None


def joined(parts: list[Columns]) -> Columns:
    """Rows of several trajectories, one after another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def save_head(store: Store, head: Projection) -> None:
    """Puts the teacher's head beside its hidden states, once."""
    if store.manifest.get("head"):
        return
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    store.keep_head(save(tensors), {"scale": head.scale, "softcap": head.softcap})


def load_head(store: Store) -> Projection:
    """What `save_head` put there. DamagedError: it is not what was written, or not there."""
    facts: dict[str, Any] | None = store.manifest.get("head")
    if facts is None:
        raise DamagedError(
            f"{store.path} has no head beside its hidden states: expected the `sadkern cache` that "
            "made it to be run again"
        )
    tensors = load(checked(store.path / facts["file"]))
    weight = tensors["weight"]
    empty = weight.new_empty(0, weight.shape[1])
    return Projection(empty, weight, tensors.get("bias"), facts["scale"], facts["softcap"])


def _numpy(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.float().cpu().numpy()


def _label_logprobs(
    source: Tensor | Projection, labels: Tensor, found: TopK, temperature: float
) -> Tensor:
    """Of the labels `[M]` under the teacher's full distribution."""
    if isinstance(source, Projection):
        logits = (source.hidden.float() * source.weight[labels].float()).sum(-1)
        if source.bias is not None:
            logits = logits + source.bias[labels].float()
        logits = logits * source.scale
        if source.softcap:
            logits = source.softcap * torch.tanh(logits / source.softcap)
    else:
        logits = source.gather(-1, labels[:, None]).squeeze(-1).float()
    assert found.lse is not None
    return logits / temperature - found.lse


def _entry(signal: TopK, labels: Tensor) -> Tensor:
    """The labels' log-probabilities where they are among the K, else NaN: not known."""
    hit = signal.ids == labels[:, None]
    found = torch.where(hit, signal.logprobs.float(), -torch.inf).amax(-1)
    return torch.where(hit.any(-1), found, torch.nan)


def whole(signal: TopK) -> TopK:
    """With tail and entropy, from what is given where they are not."""
    logprobs = signal.logprobs.double().masked_fill(signal.ids < 0, -torch.inf)
    tail = signal.tail_mass
    if tail is None:
        tail = (1 - logprobs.exp().sum(-1)).clamp(min=0)
    entropy = signal.entropy
    if entropy is None:  # of the K and of the tail as one bucket: at most the true one
        mass = torch.cat([logprobs.exp(), tail.double()[:, None]], dim=-1)
        entropy = -torch.xlogy(mass, mass).sum(-1)
    return replace(signal, logprobs=logprobs, tail_mass=tail, entropy=entropy)
