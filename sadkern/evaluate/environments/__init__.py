"""Worlds that an agent acts in by text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

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
    """What `make` makes of each line of a JSON-lines file, gzipped or not. ValueError: a line that
    is no JSON, or that it refuses, named."""
    path = Path(path)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                made = make(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield made
