"""What there is to play: of each environment, tasks that are made when their turn comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from sadkern.evaluate.environments import (
    Environment,
    alfworld,
    alfworld_games,
    hotpotqa,
    webshop,
    webshop_goods,
)
from sadkern.evaluate.environments.isolated import Isolated
from sadkern.evaluate.play import play
from sadkern.evaluate.scripted import perfect

PRODUCTS = 1000  # of a shop of our own
MADE = 100  # games or goals, where no number is asked for


class Task(NamedTuple):
    """`make` begins the environment's work, such as starting an engine."""

    env: str
    name: str
    make: Callable[[], Environment]


def _alfworld(path: Path | None, count: int | None, seed: int) -> list[Task]:
    """Of a file, or made: of those, each is played to its end once, as proof that it can be."""
    if path is not None:
        chosen = list(alfworld.games(path))
    else:
        numbers = track(range(count or MADE), "making games", console=Console(stderr=True))
        chosen = [checked(alfworld_games.game(seed, number)) for number in numbers]
    made = [(game["id"], partial(alfworld.ALFWorld, game)) for game in chosen]
    return [
        Task("alfworld", name, partial(Isolated, "alfworld", name, make)) for name, make in made
    ]


def checked(game: dict[str, Any]) -> dict[str, Any]:
    """`game`. ValueError: an agent that sees everything cannot win it."""
    env = alfworld.ALFWorld(game)
    episode = play(env, perfect(env))
    env.close()
    if not episode.success:
        raise ValueError(f"{game['id']} cannot be won: {episode.failure}")
    return game


def _hotpotqa(path: Path | None, count: int | None, seed: int) -> list[Task]:
    if path is None:
        raise ValueError("HotPotQA's questions are in a file: expected --games questions.jsonl.gz")
    made = list(hotpotqa.questions(path))
    return [Task("hotpotqa", env.task, lambda env=env: env) for env in made]  # type: ignore[misc]


def _webshop(path: Path | None, count: int | None, seed: int) -> list[Task]:
    if path is not None:
        raise ValueError(f"WebShop's goals are made here: expected no --games, got {path}")
    products = webshop_goods.catalogue(PRODUCTS)
    shop = webshop.Shop(products)
    return [
        Task("webshop", goal.id, partial(webshop.WebShop, shop, goal))
        for goal in webshop_goods.goals(products, count or MADE, seed)
    ]


KINDS = {"alfworld": _alfworld, "hotpotqa": _hotpotqa, "webshop": _webshop}


def tasks_of(env: str, path: Path | None, count: int | None, seed: int) -> list[Task]:
    """The first `count`, or all. `seed` draws where they are drawn. ValueError: no such
    environment, or a file that is missing or wrong; OSError: one that cannot be read."""
    if env not in KINDS:
        raise ValueError(f"env={env!r}: expected one of {', '.join(KINDS)}")
    return KINDS[env](path, count, seed)[:count]
