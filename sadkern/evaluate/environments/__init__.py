"""Worlds that an agent acts in by text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sadkern.spans.files import read_lines

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """Of an action. `success` and `reward` count when `done`; `invalid`: the action was none that
    the environment knows, and nothing happened."""

    observation: str
    reward: float = 0.0
    done: bool = False
    success: bool = False
    invalid: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """One task. What goes wrong in it, it raises: the agent loop ends that episode alone."""

    name: str  # of the kind, such as hotpotqa
    task: str  # its own name within the kind

    def reset(self) -> str:
        """Begins anew; what is seen first, the goal included."""
        ...

    def step(self, action: str) -> Outcome:
        """Does what `action` says."""
        ...

    def close(self) -> None:
        """Lets go of what it holds."""
        ...


def records(path: Path | str, make: Callable[[Any], T]) -> Iterator[T]:
    """What `make` makes of each record of a file, as `sadkern.spans.files.read_lines` reads it.
    ValueError: a line that is no JSON, or that it refuses, named."""
    for number, record, fault in read_lines(path):
        try:
            if fault is not None:
                raise ValueError(fault)
            made = make(record)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        yield made
