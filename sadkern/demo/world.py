"""The small world of the demonstration: three scripted environments and agents that play them.

Run as a module it writes the trajectories that the demonstration learns from.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sadkern.files import write_whole

from . import facts, facts_agent, household, household_agent, shop, shop_agent
from .agent import Steps

MOST_STEPS = 12  # where an episode without success is given up


class Environment(Protocol):
    """A task in a world with state; the world alone judges whether the task is done."""

    @property
    def task(self) -> str:
        """The goal or question."""

    def reset(self) -> str:
        """Go back to the start and return the first observation."""

    def step(self, action: str) -> tuple[str, float, bool]:
        """Return the observation, the reward (1 on success, else 0) and whether it is over."""


class Step(NamedTuple):
    """One turn of an episode."""

    thought: str
    action: str
    observation: str


class Episode(NamedTuple):
    """A task played from its first observation to its end."""

    task: str
    opening: str
    steps: list[Step]
    success: bool


class Scene(NamedTuple):
    """How one kind of environment is built, played and written down."""

    build: Callable[[int, int], Environment]
    agent: Callable[[str, str, random.Random], Steps]
    tasks: Callable[[int], Sized]
    format: str


SCENES = {
    "household": Scene(household.build, household_agent.agent, household.goals, "paper"),
    "shop": Scene(shop.build, shop_agent.agent, shop.goals, "paper"),
    "facts": Scene(facts.build, facts_agent.agent, facts.questions, "react"),
}


def environment(env: str, index: int, seed: int = 0) -> Environment:
    """Build the world of one record afresh.

    >>> world = environment("facts", 0)
    >>> world.reset() == world.task
    True
    >>> world.step("Dance[]")
    ('Nothing happens.', 0.0, False)
    """
    scene = SCENES[env]
    count = len(scene.tasks(seed))
    if not 0 <= index < count:
        raise ValueError(f"{env} has {count} tasks, numbered from 0, so there is no task {index}")
    return scene.build(index, seed)


def play(env: str, world: Environment, rng: random.Random) -> Episode:
    """Let the scripted agent of a kind of environment play a world; it sees observations only."""
    opening = observation = world.reset()
    moves = SCENES[env].agent(world.task, opening, rng)
    steps: list[Step] = []
    reward, done = 0.0, False
    while not done and len(steps) < MOST_STEPS:
        try:
            thought, action = moves.send(observation) if steps else next(moves)
        except StopIteration:
            break
        observation, reward, done = world.step(action)
        steps.append(Step(thought, action, observation))
    return Episode(world.task, opening, steps, done and reward == 1.0)


def transcript(episode: Episode, form: str) -> str:
    """Write an episode down, in the "paper" form (Reasoning:) or "react" form (Thought 1:)."""
    if form == "react":
        lines = [f"Question: {episode.task}"]
        for n, (thought, action, observation) in enumerate(episode.steps, 1):
            lines += [f"Thought {n}: {thought}", f"Action {n}: {action}"]
            lines += [f"Observation {n}: {observation}"]
    else:
        lines = [f"Goal: {episode.task}", f"Observation: {episode.opening}"]
        for thought, action, observation in episode.steps:
            lines += [f"Reasoning: {thought}", f"Action: {action}", f"Observation: {observation}"]
    return "\n".join(lines)


def generate(count_per_env: int = 120, seed: int = 0) -> list[dict[str, Any]]:
    """Play the first tasks of each environment and return one record for each episode.

    The environments take turns. The same arguments give the same records.
    """
    records = []
    for index in range(count_per_env):
        for env, scene in SCENES.items():
            rng = random.Random(f"{env} agent {seed} {index}")
            episode = play(env, environment(env, index, seed), rng)
            if not episode.success:
                raise RuntimeError(f"the {env} agent failed at {episode.task!r}")
            records.append(
                {
                    "id": f"{env}-{index:04d}",
                    "env": env,
                    "format": scene.format,
                    "task": episode.task,
                    "success": episode.success,
                    "text": transcript(episode, scene.format),
                }
            )
    return records


def to_jsonl(records: Sequence[dict[str, Any]]) -> str:
    """One JSON object a line, in ASCII."""
    return "".join(json.dumps(record) + "\n" for record in records)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write trajectories to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m sadkern.demo.world",
        description="Play the small world and write one trajectory a line, as JSON.",
        epilog="The three environments (household, shop, facts) take turns in the file. Every "
        "trajectory succeeds by the world's own test. The same seed and count give the same file; "
        "another seed gives other rooms, goods and facts, fit for testing what was learnt.",
    )
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument(
        "--per-env", type=int, default=120, help="trajectories of each environment (default: 120)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the seed of everything drawn at random (default: 0)"
    )
    options = parser.parse_args(arguments)
    if options.per_env < 1:
        parser.error("--per-env must be at least 1")
    if not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}; make it first")
    try:
        records = generate(options.per_env, options.seed)
    except ValueError as error:
        parser.error(f"--per-env {options.per_env} is too many: {error}")
    write_whole(options.output, to_jsonl(records).encode("ascii"))
    print(f"{len(records)} trajectories written to {options.output}")


if __name__ == "__main__":
    main()
