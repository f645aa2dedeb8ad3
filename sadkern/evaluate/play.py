"""Episodes: a policy in environments, to their ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from sadkern.evaluate.environments import Environment, Outcome
from sadkern.evaluate.episode import Episode, Turn


class Move(NamedTuple):
    """What a policy does next."""

    thought: str
    action: str
    thought_tokens: int = 0
    action_tokens: int = 0


Policy = Callable[[str], Move]  # of what was seen last


class Running:
    """An episode that goes on until the environment says so, `max_turns` are over, or
    `max_invalid` actions in a row were none that it knows. What the environment raises ends this
    episode as failed and is named in it."""

    def __init__(
        self,
        env: Environment,
        *,
        max_turns: int = 50,
        max_invalid: int | None = None,
        sample: int = 0,
    ):
        self.env, self.max_turns, self.max_invalid = env, max_turns, max_invalid
        self._invalid, self._outcome = 0, Outcome("")
        self.over = False
        self.episode = Episode(env.name, env.task, (), success=False, reward=0.0, sample=sample)
        try:
            self.episode = replace(self.episode, opening=env.reset())
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")

    @property
    def seen(self) -> str:
        """Last."""
        turns = self.episode.turns
        return turns[-1].observation if turns else self.episode.opening

    def do(self, move: Move) -> None:
        """A turn."""
        turns = self.episode.turns
        turn = Turn(move.thought, move.action, "", move.thought_tokens, move.action_tokens)
        try:
            outcome = self.env.step(move.action)
        except Exception as error:  # an environment's fault is one episode's
            self.episode = replace(self.episode, turns=(*turns, turn))
            self.fail(f"{type(error).__name__}: {error}")
            return
        turn = replace(turn, observation=outcome.observation)
        self.episode = replace(
            self.episode, turns=(*turns, turn), reward=outcome.reward, facts=dict(outcome.facts)
        )  # fmt: skip
        self._invalid = self._invalid + 1 if outcome.invalid else 0
        if outcome.done:
            self.episode = replace(self.episode, success=outcome.success)
            self.over = True
        elif self._invalid == self.max_invalid:
            self.fail(f"{self._invalid} invalid actions in a row")
        elif len(self.episode.turns) >= self.max_turns:
            self.fail(f"{self.max_turns} turns")

    def fail(self, why: str) -> None:
        """Ends it."""
        self.episode = replace(self.episode, success=False, failure=why)
        self.over = True


def play(env: Environment, policy: Policy, **limits: int) -> Episode:
    """One episode; `limits` as of `Running`. What the policy raises fails it too."""
    running = Running(env, **limits)
    while not running.over:
        try:
            move = policy(running.seen)
        except Exception as error:
            running.fail(f"{type(error).__name__}: {error}")
        else:
            running.do(move)
    return running.episode


def play_together(
    episodes: Iterable[Running],
    policy: Callable[[Sequence[Episode]], Sequence[Move]],
    batch_size: int,
) -> Iterator[Episode]:
    """Each as it ends. So many go on at a time, and `policy` moves in all of them at once; each is
    begun when there is room, and its environment closed at its end."""
    waiting = iter(episodes)
    active: list[Running] = []
    while True:
        active += islice(waiting, batch_size - len(active))
        if not active:
            return
        for running in active:
            if running.over:
                with suppress(Exception):  # the episode is over all the same
                    running.env.close()
                yield running.episode
        active = [running for running in active if not running.over]
        if active:
            moves = policy([running.episode for running in active])
            for running, move in zip(active, moves, strict=True):
                running.do(move)
