"""The paper's metrics (*Structured Agent Distillation*, appendix C, equations 8 to 11), of episode
logs, with bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sadkern.evaluate.episode import Episode

RESAMPLES, CONFIDENCE = 2000, 0.95
Tokens = Callable[[str], Sequence[Hashable]]


class Interval(NamedTuple):
    """A mean over episodes, and between what it lies with a confidence of 95 %."""

    value: float
    low: float
    high: float
    episodes: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of `values`, with percentiles of the means of resamples; NaN of none.

    >>> bootstrap([1, 1, 1]).value
    1.0
    """
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    data = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(data), size=(RESAMPLES, len(data)))
    rest = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(data[chosen].mean(1), (rest, 100 - rest))
    return Interval(float(data.mean()), float(low), float(high), len(data))


def success_rate(episodes: Sequence[Episode]) -> Interval:
    """Equation 8: tasks whose last state is what was asked for, of all."""
    return bootstrap([float(episode.success) for episode in episodes])


def reward(episodes: Sequence[Episode]) -> Interval:
    """The environments' own score, at most 1."""
    return bootstrap([episode.reward for episode in episodes])


def reasoning_length(episodes: Sequence[Episode]) -> Interval:
    """Equations 9 and 10: tokens of an episode's thoughts together."""
    return bootstrap([episode.thought_tokens for episode in episodes])


def steps(episodes: Sequence[Episode]) -> Interval:
    """Equation 11: thoughts and actions of an episode."""
    return bootstrap([episode.steps for episode in episodes])


def cot_match(student: Sequence[Hashable], teacher: Sequence[Hashable]) -> float:
    """The share of the teacher's reasoning tokens that the student's reasoning has too.

    |student ∩ teacher| / |teacher| over multisets of tokens (*Structured Agent Distillation*,
    appendix C); 1 where the teacher has none.

    >>> cot_match("abcdefxyz", "abcdefghi")  # 6 of the teacher's 9
    0.6666666666666666
    """
    if not teacher:
        return 1.0
    return (Counter(student) & Counter(teacher)).total() / len(teacher)


def cot_match_rate(
    episodes: Sequence[Episode], teacher: Sequence[Episode], tokens: Tokens = str.split
) -> Interval:
    """`cot_match` of the thoughts of episodes whose task the teacher has too: its first one."""

    def thoughts(episode: Episode) -> Sequence[Hashable]:
        return tokens("\n".join(turn.thought for turn in episode.turns if turn.thought))

    pairs = _pairs(episodes, teacher)
    return bootstrap([cot_match(thoughts(own), thoughts(theirs)) for own, theirs in pairs])


def action_match_rate(episodes: Sequence[Episode], teacher: Sequence[Episode]) -> Interval:
    """The share of the teacher's actions that an episode has at the same place, of those whose task
    the teacher has too; case and blanks do not count."""

    def actions(episode: Episode) -> list[str]:
        return [" ".join(turn.action.lower().split()) for turn in episode.turns if turn.action]

    found = []
    for own, theirs in _pairs(episodes, teacher):
        expected = actions(theirs)
        if expected:
            same = sum(a == b for a, b in zip(actions(own), expected, strict=False))
            found.append(same / len(expected))
    return bootstrap(found)


def summary(
    episodes: Sequence[Episode],
    teacher: Sequence[Episode] = (),
    tokens: Tokens = str.split,
    further: Mapping[tuple[str, str, int], Mapping[str, float]] | None = None,
) -> dict[str, dict[str, Interval]]:
    """All of them, of each environment and, where there are several, of "all". `further`: of an
    episode's key, numbers of which means are wanted too."""
    envs = sorted({episode.env for episode in episodes})
    found = {}
    for env in [*envs, *(["all"] if len(envs) > 1 else [])]:
        own = [one for one in episodes if env in (one.env, "all")]
        rows = {
            "success": success_rate(own),
            "reward": reward(own),
            "reasoning tokens": reasoning_length(own),
            "steps": steps(own),
        }
        if teacher:
            rows["CoT match"] = cot_match_rate(own, teacher, tokens)
            rows["action match"] = action_match_rate(own, teacher)
        numbers = [(further or {}).get(one.key, {}) for one in own]
        for name in dict.fromkeys(name for of in numbers for name in of):
            rows[name] = bootstrap([of[name] for of in numbers if name in of])
        found[env] = rows
    return found


def _pairs(
    episodes: Sequence[Episode], teacher: Sequence[Episode]
) -> list[tuple[Episode, Episode]]:
    first: dict[tuple[str, str], Episode] = {}
    for episode in teacher:
        first.setdefault((episode.env, episode.task), episode)
    tasks = ((episode, first.get((episode.env, episode.task))) for episode in episodes)
    return [(own, theirs) for own, theirs in tasks if theirs is not None]
