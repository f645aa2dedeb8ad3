"""What an agent did on a task, and a log of it: one JSON object a line, so that any run can be
scored again and goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Turn:
    """A thought and an action, either of which may be missing (""), and what came back."""

    thought: str
    action: str
    observation: str
    thought_tokens: int = 0
    action_tokens: int = 0


@dataclass(frozen=True)
class Episode:
    """`task` names it within `env`; `sample` tells attempts at it apart. `reward`: the
    environment's, of which 1 is all. `failure`: what ended it before its time, "" where nothing
    did."""

    env: str
    task: str
    turns: tuple[Turn, ...]
    success: bool
    reward: float
    sample: int = 0
    opening: str = ""  # what the environment said first
    failure: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # the environment's own, such as F1

    @property
    def key(self) -> tuple[str, str, int]:
        """What no two episodes of a run share."""
        return self.env, self.task, self.sample

    @property
    def thought_tokens(self) -> int:
        """|r| of equation 9."""
        return sum(turn.thought_tokens for turn in self.turns)

    @property
    def steps(self) -> int:
        """S of equation 11: thoughts and actions, as the paper counts latency."""
        return sum(bool(turn.thought) + bool(turn.action) for turn in self.turns)

    @property
    def text(self) -> str:
        """A ReAct transcript, as trajectories are written that students learn from."""
        lines = [self.opening] if self.opening else []
        for turn in self.turns:
            parts = ("Thought", turn.thought), ("Action", turn.action)
            lines += [f"{name}: {said}" for name, said in parts if said]
            if turn.observation:
                lines.append(f"Observation: {turn.observation}")
        return "\n".join(lines) + "\n"


class Log:
    """Episodes of a run, appended one by one and kept whatever ends the run.

    ValueError: a line that is no episode, other than a last one that was cut short, which is
    written anew.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.episodes: list[Episode] = []
        self._keys: set[tuple[str, str, int]] = set()
        self._whole = self._read() if self.path.exists() else 0

    def _read(self) -> int:
        """Bytes that are episodes."""
        whole = 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("it does not end")
                self._add(episode_of(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines):
                    break
                raise ValueError(f"{self.path}, line {number}: no episode ({error})") from None
            whole += len(line)
        return whole

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self._keys

    def append(self, episode: Episode) -> None:
        """On the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(asdict(episode), ensure_ascii=False) + "\n").encode()
        with self.path.open("ab") as file:
            file.truncate(self._whole)  # of what was cut short
            file.write(line)
        self._whole += len(line)
        self._add(episode)

    def _add(self, episode: Episode) -> None:
        self.episodes.append(episode)
        self._keys.add(episode.key)


def episode_of(record: dict[str, Any]) -> Episode:
    """Of a log's line. TypeError, KeyError: it is none."""
    turns = tuple(Turn(**turn) for turn in record["turns"])
    return Episode(**{**record, "turns": turns})


def read(paths: Iterable[Path | str]) -> Iterator[Episode]:
    """Of logs. OSError, ValueError: as of `Log`."""
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: expected a log of episodes")
        yield from Log(path).episodes
