"""Sides whose tensors are DTensors, as torch's tensor parallelism leaves them."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from sadkern.sides import Projection, Side, TopK, tensors_of

# Of each tensor that has a dimension of the vocabulary, which that is.
VOCABULARY = {"": -1, ".weight": 0, ".bias": 0}


def local(student: Any, teacher: Any, group: ProcessGroup | None) -> tuple[Any, Any, str | None]:
    """Both sides with a rank's own tensors in place of DTensors, through which gradients find back,
    and the name of the group that shares their vocabulary: `group`'s, or that they are cut along.

    ValueError: DTensors that are cut otherwise, or two sides that are not cut alike.
    """
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(f"group is a {type(group).__name__}, expected a ProcessGroup")
    given: str | None = None if group is None else group.group_name
    if "torch.distributed.tensor" not in sys.modules:  # nobody has made one
        return student, teacher, given
    student, of_student = _local("student", student, given)
    teacher, of_teacher = _local("teacher", teacher, given)
    if not isinstance(teacher, TopK) and of_student != of_teacher:
        raise ValueError(
            f"the vocabulary of the student is shared by {_called(of_student)} and that of the "
            f"teacher by {_called(of_teacher)}, expected one group for both (or a TopK teacher)"
        )
    return student, teacher, of_student


def _called(group: str | None) -> str:
    return "no group" if group is None else f"group {group}"


def _local(name: str, side: Any, given: str | None) -> tuple[Any, str | None]:
    """`side` of a rank's own tensors, and the group that shares its vocabulary: `given`, or that of
    its DTensors."""
    from torch.distributed.tensor import DTensor

    if not isinstance(side, Tensor | Projection | TopK):
        return side, given  # which is refused elsewhere
    held = {field: x for field, x in tensors_of(side).items() if isinstance(x, DTensor)}
    groups = {field: _cut(f"{name}{field}", field, x) for field, x in held.items()}
    found = {group for field, group in groups.items() if field in VOCABULARY}
    if given is not None:
        found.add(given)
    elif ".weight" in groups and ".hidden" not in held:
        # FSDP's weights look like this too, and its ranks do not have the same rows.
        raise ValueError(
            f"{name}.weight is a DTensor and {name}.hidden is none: expected hidden states as a "
            "DTensor [Replicate()] or a `group`, where ranks share a vocabulary and have the same "
            "rows; or the whole weight, as FSDP has it within a model's forward"
        )
    if len(found) > 1:
        told = " and ".join(sorted(map(_called, found)))
        raise ValueError(f"the vocabulary of {name} is shared by {told}, expected one group")
    return _of_rank(side, held), next(iter(found), None)


def _cut(name: str, field: str, x: Any) -> str | None:
    """The group along which `x` is cut in the vocabulary, if it is."""
    from torch.distributed.tensor import Replicate, Shard

    dim = VOCABULARY.get(field)
    cut = Shard(0 if dim is None else dim % x.ndim)
    along = [i for i, place in enumerate(x.placements) if dim is not None and place == cut]
    others = [place for i, place in enumerate(x.placements) if i not in along]
    rows = [Shard(i) for i in range(x.ndim - 1)] if field == "" else []
    if len(along) > 1 or any(place not in (Replicate(), *rows) for place in others):
        expected = "Replicate()" if dim is None else f"{cut} along one mesh dimension"
        raise ValueError(
            f"{name} is a DTensor of placements {list(x.placements)}, expected {expected} "
            "(redistribute makes it so)"
        )
    group: str | None = x.device_mesh.get_group(along[0]).group_name if along else None
    return group


def _of_rank(side: Side, held: dict[str, Any]) -> Side:
    changed: dict[str, Any] = {
        field[1:]: x.to_local(grad_placements=x.placements) for field, x in held.items()
    }
    if isinstance(side, Tensor):
        found: Tensor = changed.get("", side)
        return found
    return replace(side, **changed)
