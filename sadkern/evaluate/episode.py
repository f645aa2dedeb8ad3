"""What an agent did on a task, and a log of it: one JSON object a line, so that any run can be
scored again and goes on where it was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sadkern.files import hold


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
    """Episodes of a run, appended one by one and kept whatever ends the run. A context: leaving it
    gives the file free.

    ValueError: a line that is no episode, other than a last one that was cut short, which is
    written anew. BusyError: another run appends to it.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = hold(self.path)
        try:
            self.episodes, self._whole = _read(self.path)
        except BaseException:
            self._file.close()
            raise
        self._keys = {episode.key for episode in self.episodes}

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self._keys

    def append(self, episode: Episode) -> None:
        """On the disk when this returns."""
        line = (json.dumps(asdict(episode), ensure_ascii=False) + "\n").encode()
        self._file.truncate(self._whole)  # of what was cut short
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._whole += len(line)
        self.episodes.append(episode)
        self._keys.add(episode.key)


def _read(path: Path) -> tuple[list[Episode], int]:
    """A log's episodes, and how many of its bytes they are."""
    episodes, whole = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            ends = line.endswith(b"\n")  # only the last may not
            try:
                episode = episode_of(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                if not ends and isinstance(error, ValueError):
                    break  # (what is JSON to its end was not cut short)
                raise ValueError(f"{path}, line {number}: no episode ({error})") from None
            if ends:
                episodes.append(episode)
                whole += len(line)
    return episodes, whole


def episode_of(record: dict[str, Any]) -> Episode:
    """Of a log's line. TypeError, KeyError: it is none."""
    turns = tuple(Turn(**turn) for turn in record["turns"])
    return Episode(**{**record, "turns": turns})


def read(paths: Iterable[Path | str]) -> Iterator[Episode]:
    """Of logs. OSError, ValueError: as of `Log`."""
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: expected a log of episodes")
        yield from _read(Path(path))[0]
