"""Sides that are DTensors, as torch's tensor parallelism leaves them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_ranks import FORMS, Case, found, made
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from sadkern import Projection, TopK, span_kl


def on_mesh(rank: int, case: tuple) -> Any:
    """With DTensors, as torch's tensor parallelism has them, and no group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))["model"]
    whole = made(*case)

    def cut(x: Any, dim: int | None) -> Any:
        if x is None:
            return None
        place = [Replicate() if dim is None else Shard(dim)]
        return torch.distributed.tensor.distribute_tensor(x, mesh, place)

    def spread(side: Any) -> Any:
        if isinstance(side, TopK):
            return side
        if isinstance(side, Tensor):
            return cut(side, -1)
        head = {"weight": cut(side.weight, 0), "bias": cut(side.bias, 0)}
        return replace(side, hidden=cut(side.hidden, None), **head)

    values, gradients = found(Case(*map(spread, whole[:2]), *whole[2:]))
    assert all(isinstance(x, DTensor) for x in gradients if x is not None)
    return values, [None if x is None else x.full_tensor() for x in gradients]


@pytest.mark.parametrize("form", FORMS)
def test_dtensors_bring_their_group_along(several, form):
    case = (3, form, "skew_reverse_kl", torch.float64)
    values, gradients = found(made(*case))
    for own, theirs in several.run(4, on_mesh, case):
        for name, expected in values.items():
            torch.testing.assert_close(own[name], expected, rtol=1e-9, atol=1e-12)
        for got, expected in zip(theirs, gradients, strict=True):
            if expected is not None:
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def refused_on_mesh(rank: int, what: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    cut = torch.distributed.tensor.distribute_tensor
    logits, ids = cut(torch.zeros(3, 8), mesh, [Shard(-1)]), torch.tensor([1, 2, 0])
    sides = {
        "rows of a head": (Projection(torch.zeros(3, 2), cut(torch.zeros(8, 2), mesh, [Shard(0)])),
                           torch.zeros(3, 8)),
        "columns of a head": (
            Projection(cut(torch.zeros(3, 2), mesh, [Replicate()]),
                       cut(torch.zeros(8, 2), mesh, [Shard(1)])), torch.zeros(3, 8)),
        "one side": (logits, torch.zeros(3, 8)),
        "no group": (torch.zeros(3, 8), torch.zeros(3, 8)),
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected") as raised:
        span_kl(*sides[what], ids, group="model" if what == "no group" else None)
    return str(raised.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("rows of a head", "student.weight is a DTensor and student.hidden is none"),
        ("columns of a head", "student.weight is a DTensor of .*expected .* along one mesh dim"),
        ("one side", "of the student is shared by group .* and that of the teacher by no group"),
        ("no group", "group is a str, expected a ProcessGroup"),
    ],
)
def test_dtensors_that_are_cut_otherwise_are_refused(several, what, said):
    for message in several.run(2, refused_on_mesh, what):
        assert re.search(said, message)
