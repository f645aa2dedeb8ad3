"""Counting: spans and their lengths per environment, what is odd, and a few samples to look at."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

from sadkern.spans import ACT, REASON, Profile, Segmentation, align, segment
from sadkern.spans.files import read_lines
from sadkern.spans.kinds import NAMES
from sadkern.spans.template import templated

ENVIRONMENT = ("env", "environment")  # where a record says it


@dataclass
class Group:
    """Trajectories of one environment. Lengths are in tokens where there is a tokenizer, else in
    characters; of a trajectory, all of it."""

    trajectories: int = 0
    with_spans: int = 0
    lengths: dict[int, list[int]] = field(default_factory=lambda: {REASON: [], ACT: []})
    totals: list[int] = field(default_factory=list)
    profiles: Counter[str] = field(default_factory=Counter)

    @property
    def coverage(self) -> float:
        """The share of trajectories that have a span; 0 of none."""
        return self.with_spans / self.trajectories if self.trajectories else 0.0

    @property
    def share(self) -> float:
        """What is supervised (stops too, where lengths are in tokens), of all there is."""
        return sum(map(sum, self.lengths.values())) / sum(self.totals) if any(self.totals) else 0.0

    def shown(self) -> list[str]:
        """For people: how many trajectories, how many have spans, how much is supervised."""
        return [f"{self.trajectories:,}", f"{self.coverage:.1%}", f"{self.share:.1%}"]

    def add(self, other: Group) -> None:
        """Takes another's trajectories in."""
        self.trajectories += other.trajectories
        self.with_spans += other.with_spans
        for kind, lengths in other.lengths.items():
            self.lengths[kind] += lengths
        self.totals += other.totals
        self.profiles.update(other.profiles)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "trajectories": self.trajectories,
            "with_spans": self.with_spans,
            "coverage": self.coverage,
            "spans": {NAMES[kind]: summary(self.lengths[kind]) for kind in (REASON, ACT)},
            "supervised_share": self.share,
            "trajectory_length": summary(self.totals),
            "profiles": dict(self.profiles.most_common()),
        }


class Place(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Fault(NamedTuple):
    """A line that is no trajectory."""

    place: Place
    error: str


class Sample(NamedTuple):
    """A trajectory to be looked at."""

    place: Place
    name: str
    environment: str
    segmentation: Segmentation


@dataclass
class Warned:
    """One message: how often it came, and where first."""

    first: Place
    count: int = 0


@dataclass
class Survey:
    """Of some files. `unit`: of all lengths, "tokens" or "characters"."""

    files: list[str]
    unit: str
    environments: dict[str, Group] = field(default_factory=dict)
    warnings: dict[str, Warned] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    truncated: Counter[int] = field(default_factory=Counter)
    straddled: int = 0
    uncovered: int = 0

    @property
    def whole(self) -> Group:
        """All environments together."""
        everything = Group()
        for group in self.environments.values():
            everything.add(group)
        return everything

    def rows(self) -> list[tuple[str, Group]]:
        """Of a table: the environments by name and, where they are several, all of them."""
        groups = sorted(self.environments.items())
        return groups if len(groups) < 2 else [*groups, ("all", self.whole)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but the samples."""
        found = {"files": self.files, "unit": self.unit, **self.whole.as_dict()}
        if self.unit == "tokens":
            found["truncated"] = {NAMES[kind]: self.truncated[kind] for kind in (REASON, ACT)}
            found |= {"straddled": self.straddled, "uncovered": self.uncovered}
        return {
            **found,
            "environments": {name: group.as_dict() for name, group in self.environments.items()},
            "warnings": [
                {"warning": said, "count": warned.count, "first": str(warned.first)}
                for said, warned in self.warnings.items()
            ],
            "errors": [{**place._asdict(), "error": error} for place, error in self.faults],
        }


def summary(lengths: list[int]) -> dict[str, float]:
    """How many, and how long: their sum, median, 95th percentile and maximum."""
    if not lengths:
        return {"count": 0, "total": 0, "median": 0, "p95": 0, "max": 0}
    cuts = quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else lengths * 19
    return {
        "count": len(lengths),
        "total": sum(lengths),
        "median": cuts[9],
        "p95": cuts[18],
        "max": max(lengths),
    }


def survey(
    paths: Iterable[str | Path],
    *,
    profile: str | Path | Profile = "auto",
    tokenizer: Any = None,
    max_length: int | None = None,
    samples: int = 0,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> Survey:
    """Segments every trajectory of some files, and tokenises it where there is a tokenizer.

    Args:
        paths: files as `sadkern.spans.files.read_lines` reads them.
        profile: as of `segment`.
        tokenizer: lengths are in its tokens then, and its chat template, if any, writes chats.
        max_length: as of `align`; what it cuts is counted.
        samples: how many trajectories of each environment are kept, drawn with `seed`.
        progress: is told a file's name and how many of its bytes have been read.

    Raises:
        FileNotFoundError: no such file. (A line that is no trajectory is one of the `faults`.)
    """
    files = [str(path) for path in paths]
    found = Survey(files, "characters" if tokenizer is None else "tokens")
    writer = templated(tokenizer)
    draw = random.Random(seed)
    kept: dict[str, list[Sample]] = {}
    for path in files:
        told = None if progress is None else (lambda read, path=path: progress(path, read))
        for number, record, error in read_lines(path, told):
            place = Place(path, number)
            try:
                if error is not None:
                    raise ValueError(error)
                segmentation = segment(record, profile, tokenizer=writer)
                group = _measured(segmentation, tokenizer, max_length, found)
            except ValueError as fault:
                found.faults.append(Fault(place, str(fault)))
                continue
            environment = environment_of(record, path)
            known = found.environments.setdefault(environment, Group())
            known.add(group)
            for said in segmentation.warnings:
                found.warnings.setdefault(said, Warned(place)).count += 1
            name = str(record.get("id", number)) if isinstance(record, Mapping) else str(number)
            one = Sample(place, name, environment, segmentation)
            _draw(draw, kept.setdefault(environment, []), one, samples, known.trajectories)
    found.samples = [one for some in kept.values() for one in some]
    return found


def environment_of(record: Any, path: str) -> str:
    """As the record says it, or the file's name."""
    if isinstance(record, Mapping):
        for key in ENVIRONMENT:
            if isinstance(record.get(key), str) and record[key]:
                return record[key]
    return Path(path).name.partition(".")[0]


def _measured(found: Segmentation, tokenizer: Any, max_length: int | None, into: Survey) -> Group:
    """A group of one."""
    group = Group(trajectories=1, with_spans=bool(found.spans))
    group.profiles[found.profile or "none"] += 1
    if tokenizer is None:
        found.text.encode()  # half a surrogate pair is a ValueError
        for start, end, kind in found.spans:
            group.lengths[kind].append(end - start)
        group.totals.append(len(found.text))
        return group
    aligned = align(found, tokenizer, max_length)
    last = 0
    for kind in [*aligned.span_ids, 0]:
        if kind and kind == last:
            group.lengths[kind][-1] += 1
        elif kind:
            group.lengths[kind].append(1)
        last = kind
    group.totals.append(aligned.length)
    into.truncated.update(aligned.truncated)
    into.straddled += aligned.straddled
    into.uncovered += aligned.uncovered
    return group


def _draw(draw: random.Random, kept: list[Sample], one: Sample, samples: int, seen: int) -> None:
    """Keeps each of those seen with the same chance."""
    if len(kept) < samples:
        kept.append(one)
    elif samples and (place := draw.randrange(seen)) < samples:
        kept[place] = one
