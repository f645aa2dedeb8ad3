"""Agents without a model, which show what an environment's best and worst are: one that sees its
state and does what is needed, with thoughts, and one that draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from sadkern.evaluate.environments.alfworld import ALFWorld
from sadkern.evaluate.environments.hotpotqa import HotPotQA
from sadkern.evaluate.environments.webshop import WebShop
from sadkern.evaluate.play import Move, Policy


def perfect(env: Any) -> Policy:
    """Of any of the environments here. TypeError: of no other."""
    for kind, plan in PLANS.items():
        if isinstance(env, kind):
            moves: Iterator[tuple[str, str]] = plan(env)
            return lambda _: _move(*next(moves))
    raise TypeError(f"{type(env).__name__}: expected {', '.join(x.__name__ for x in PLANS)}")


def drawn(env: Any, seed: int) -> Policy:
    """Of what could be done, each alike."""
    rng = random.Random(seed)
    return lambda _: _move("", rng.choice(env.admissible))


def _move(thought: str, action: str) -> Move:
    return Move(thought, action, len(thought.split()), len(action.split()))


# HotPotQA: it is told which paragraphs hold the facts, by the record, and the answer.


def _hotpotqa(env: HotPotQA) -> Iterator[tuple[str, str]]:
    for title in dict.fromkeys(title for title, _ in env.record.get("supporting_facts", ())):
        yield f"I need to read about {title}.", f"Search[{title}]"
    yield f"So the answer is {env.answer}.", f"Finish[{env.answer}]"


# ALFWorld: it sees the engine's facts.

CHANGES = {  # of a task's type: how the object is changed, and where
    "pick_clean_then_place_in_recep": ("clean", "sinkbasin"),
    "pick_heat_then_place_in_recep": ("heat", "microwave"),
    "pick_cool_then_place_in_recep": ("cool", "fridge"),
}


class Facts:
    """Of a moment of a game."""

    def __init__(self, env: ALFWorld):
        self.of: dict[str, list[tuple[str, ...]]] = {}
        for fact in env.state["facts"]:
            names = tuple(argument.name.strip() for argument in fact.arguments)
            self.of.setdefault(fact.name, []).append(names)

    def place(self, thing: str) -> str | None:
        """What receptacle it is in."""
        return next((r for o, r in self.of.get("inreceptacle", ()) if o == thing), None)

    def objects(self, kind: str) -> list[str]:
        """That can be reached."""
        named = (o for o, of in self.of["objecttype"] if of == f"{kind}type")
        return sorted(o for o in named if self.place(o) is not None)

    def receptacles(self, kind: str) -> list[str]:
        return sorted(r for r, of in self.of["receptacletype"] if of == f"{kind}type")

    def closed(self, receptacle: str) -> bool:
        return (receptacle,) in self.of.get("openable", ()) and (
            (receptacle,) not in self.of.get("opened", ())
        )


def _alfworld(env: ALFWorld) -> Iterator[tuple[str, str]]:
    params, kind = env.game["pddl_params"], env.game["task_type"]
    wanted = params["object_target"].lower()
    target = (params["parent_target"] or "").lower()
    facts = Facts(env)
    if kind == "look_at_obj_in_light":
        thing = facts.objects(wanted)[0]
        yield from _take(env, thing)
        lamp = facts.objects(params["toggle_target"].lower())[0]
        yield f"Now I need a {lamp.split()[0]} to look at it.", f"go to {facts.place(lamp)}"
        yield f"I am at {lamp} with {thing}.", f"use {lamp}"
        return
    count = 2 if kind == "pick_two_obj_and_place" else 1
    goal = facts.receptacles(target)[0]
    if kind in CHANGES:
        there: list[str] = []
    else:
        there = [o for o in facts.objects(wanted) if facts.place(o) == goal]
    others = [o for o in facts.objects(wanted) if o not in there]
    for thing in others[: count - len(there)]:
        yield from _take(env, thing)
        if kind in CHANGES:
            change, at = CHANGES[kind]
            tool = facts.receptacles(at)[0]
            yield f"I have to {change} it with a {at}.", f"go to {tool}"
            yield f"I can {change} it here.", f"{change} {thing} with {tool}"
        yield f"Now it belongs to {goal}.", f"go to {goal}"
        if Facts(env).closed(goal):
            yield f"{goal} is closed.", f"open {goal}"
        # Not just anywhere near: a dresser's drawers are where it is.
        puts = (f"put {thing} in/on {goal}", f"move {thing} to {goal}")
        put = next(said for said in puts if said in env.admissible)
        yield f"I put {thing} there.", put


def _take(env: ALFWorld, thing: str) -> Iterator[tuple[str, str]]:
    facts = Facts(env)
    place = facts.place(thing)
    assert place is not None
    yield f"I need {thing}, which is at {place}.", f"go to {place}"
    if Facts(env).closed(place):
        yield f"{place} is closed.", f"open {place}"
    yield f"There is {thing}.", f"take {thing} from {place}"


# WebShop: it knows which product was meant.


def _webshop(env: WebShop) -> Iterator[tuple[str, str]]:
    product = env.shop.by_asin[env.goal.asin.lower()]
    yield f"I look for {product.name}.", f"search[{product.name}]"
    click = f"click[{product.asin}]"
    while click not in env.admissible:
        yield "It is not among these.", "click[Next >]"
    yield f"{product.asin} is what was asked for.", click
    for kind, value in env.goal.options.items():
        yield f"The {kind} is to be {value}.", f"click[{value}]"
    yield "All is chosen.", "click[Buy Now]"


PLANS: dict[type, Callable[[Any], Iterator[tuple[str, str]]]] = {
    ALFWorld: _alfworld, HotPotQA: _hotpotqa, WebShop: _webshop,
}  # fmt: skip
