"""Episodes: a policy in an environment, to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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


def play(
    env: Environment,
    policy: Policy,
    *,
    max_turns: int = 50,
    max_invalid: int | None = None,
    sample: int = 0,
) -> Episode:
    """Until the environment says so, `max_turns` are over, or `max_invalid` actions in a row were
    none that it knows. What it or the policy raises ends this episode as failed and is named in it.
    """
    episode = Episode(env.name, env.task, (), success=False, reward=0.0, sample=sample)
    turns: list[Turn] = []
    outcome = Outcome("")
    failure, invalid = f"{max_turns} turns", 0
    try:
        seen = env.reset()
        episode = replace(episode, opening=seen)
        while len(turns) < max_turns:
            move = policy(seen)
            turns.append(
                Turn(move.thought, move.action, "", move.thought_tokens, move.action_tokens)
            )
            outcome = env.step(move.action)
            seen = outcome.observation
            turns[-1] = replace(turns[-1], observation=seen)
            invalid = invalid + 1 if outcome.invalid else 0
            if outcome.done:
                failure = ""
                break
            if invalid == max_invalid:
                failure = f"{invalid} invalid actions in a row"
                break
    except Exception as error:  # an environment's fault is one episode's
        failure = f"{type(error).__name__}: {error}"
    return replace(
        episode, turns=tuple(turns), success=outcome.success and not failure,
        reward=outcome.reward, failure=failure, facts=dict(outcome.facts),
    )  # fmt: skip
