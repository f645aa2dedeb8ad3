"""What there is to play: of each environment, tasks that are made when their turn comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sadkern.evaluate.environments import Environment, alfworld, hotpotqa, webshop, webshop_goods

PRODUCTS = 1000  # of a shop of our own


class Task(NamedTuple):
    """`make` begins the environment's work, such as starting an engine."""

    env: str
    name: str
    make: Callable[[], Environment]


def _alfworld(path: Path | None, count: int | None, seed: int) -> list[Task]:
    if path is None:
        raise ValueError("ALFWorld's games are in a file: expected --games games.jsonl.gz")
    return [
        Task("alfworld", game["id"], partial(alfworld.ALFWorld, game))
        for game in alfworld.games(path)
    ]


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
        for goal in webshop_goods.goals(products, count or 100, seed)
    ]


KINDS = {"alfworld": _alfworld, "hotpotqa": _hotpotqa, "webshop": _webshop}


def tasks_of(env: str, path: Path | None, count: int | None, seed: int) -> list[Task]:
    """The first `count`, or all. `seed` draws where they are drawn. ValueError: no such
    environment, or a file that is missing or wrong; OSError: one that cannot be read."""
    if env not in KINDS:
        raise ValueError(f"env={env!r}: expected one of {', '.join(KINDS)}")
    return KINDS[env](path, count, seed)[:count]
