"""An agent for ALFWorld that is given nothing but text: it searches where things usually are, and
says before every action why. Its episodes are what the teacher learns from."""

from __future__ import annotations

import random
import re
from collections.abc import Generator, Iterator
from typing import NamedTuple

from sadkern.evaluate.environments.alfworld_games import HOMES
from sadkern.evaluate.play import Move, Policy

NAME = re.compile(r"[a-z]+ \d+")
GOALS = (  # of a task's wording; what is found in it
    (re.compile(r"(?:look at|examine the) (?P<o>\w+) (?:under|with) the (?P<lamp>\w+)"), "examine"),
    (re.compile(r"(?:find|put) two (?P<o>\w+) (?:and put them )?in (?P<r>\w+)"), "two"),
    (re.compile(r"put a (?P<how>clean|hot|cool) (?P<o>\w+) in (?P<r>\w+)"), "treat"),
    (re.compile(r"(?P<how>clean|heat|cool) some (?P<o>\w+) and put it in (?P<r>\w+)"), "treat"),
    (re.compile(r"put (?:a|some) (?P<o>\w+) (?:in|on) (?P<r>\w+)"), "put"),
)
TREATMENTS = {
    "clean": ("clean", "sinkbasin"),
    "heat": ("heat", "microwave"),
    "hot": ("heat", "microwave"),
    "cool": ("cool", "fridge"),
}
# What every thought begins with: what is far back in a transcript stands in the last thought too.
PURPOSES = {
    "examine": "I have to look at {o} under {lamp}. ",
    "two": "I have to put two {o} in {r}. ",
    "treat": "I have to {verb} {o} and put it in {r}. ",
    "put": "I have to put {o} in {r}. ",
}
LIKELY = {o.lower(): homes.lower().split() for o, homes in HOMES.items()}

# What is looked for is named first, and where it is: whether the one is here, and what comes after
# the other, is then seen by a look at what stands there.
LOOK_FOR = ("I look for a {kind}. ", "I need a {kind}. ")
FIRST = ("It may be at {place}, so I go there.",)
NEXT = ("I see none. From {here} I go to {place}.",)
FOUND = ("I see {thing}, so I take it.",)
LIT = ("I see {thing}, so I turn it on.",)
KNOWN = ("I have seen {thing} at {place}, so I go there.",)
CLOSED = ("{place} is closed, so I open it.", "I open {place} to see what is in it.")
TREAT_GO = ("I go to {place} to {verb} {thing}.",)
TREAT = ("I {verb} {thing} here.", "I am at {place}, so I {verb} {thing}.")
BRING = ("Now I bring {thing} to {place}.", "{thing} belongs to {place}, so I go there.")
PUT = ("I put {thing} here.", "I am at {place}, so I put {thing} here.")

# The chance, where it sees none, that it takes one for there, and where a kind of places ends, that
# it goes for another: it learns that there is none, as a student has to that is mistaken.
MISTAKEN = 0.1

Step = tuple[str, str]
Steps = Generator[Step, str, None]


class Goal(NamedTuple):
    kind: str
    asked: dict[str, str]

    @property
    def purpose(self) -> str:
        verb = TREATMENTS[self.asked["how"]][0] if "how" in self.asked else ""
        return PURPOSES[self.kind].format(verb=verb, **self.asked)


def goal_of(task: str) -> Goal:
    """`task`: its wording, as a game opens with it."""
    return next(
        Goal(kind, found.groupdict()) for pattern, kind in GOALS if (found := pattern.match(task))
    )


def in_order(places: list[str]) -> list[str]:
    """As they are gone through: kinds as they are listed, of each the first one first."""
    kinds = [place.split()[0] for place in places]
    return sorted(places, key=lambda place: (kinds.index(place.split()[0]), int(place.split()[1])))


class _Explorer:
    """It remembers what it has seen where, and what it has looked into."""

    def __init__(self, opening: str, rng: random.Random):
        room, _, task = opening.partition("Your task is to: ")
        self.rng = rng
        self.places = in_order(NAME.findall(room))
        self.goal = goal_of(task)
        self.seen: dict[str, str] = {}
        self.looked: list[str] = []
        self.here = ""

    def say(self, options: tuple[str, ...], **words: str) -> str:
        return self.rng.choice(options).format(here=self.here, **words)

    def go(self, thought: str, place: str) -> Steps:
        seen = yield thought, f"go to {place}"
        self.here = place
        if seen.endswith("is closed."):
            seen = yield self.say(CLOSED, place=place), f"open {place}"
        self.looked.append(place)
        _, _, there = seen.partition("you see ")
        self.seen.update(dict.fromkeys(NAME.findall(there), place))

    def known(self, kind: str, but: str) -> str:
        """One that was seen, other than where it is to go."""
        return next(
            (x for x, at in self.seen.items() if x.split()[0] == kind and at.split()[0] != but), ""
        )

    def some_here(self, kind: str) -> bool:
        return any(x.split()[0] == kind and at == self.here for x, at in self.seen.items())

    def find(
        self, kind: str, target: str, options: tuple[str, ...], action: str
    ) -> Generator[Step, str, str]:
        """Until one is seen, and then to it; which it is. `action` is what it is wanted for."""
        looking = tuple(first + "{said}" for first in LOOK_FOR)
        homes = LIKELY.get(kind, [])
        likely = [p for home in homes for p in self.places if p.split()[0] == home != target]
        rest = [p for p in self.places if p not in likely and p.split()[0] != target]
        for place in likely + rest:
            if self.known(kind, target):
                break
            if place not in self.looked:
                if self.here and not self.some_here(kind) and self.rng.random() < MISTAKEN:
                    thing = f"{kind} {self.rng.randint(1, 3)}"
                    said = self.say(looking, kind=kind, said=self.say(options, thing=thing))
                    yield said, action.format(thing=thing, here=self.here)
                among, number = self.here.split() or ("", 0)
                another = f"{among} {int(number) + 1}"
                if self.here and another not in self.places and self.rng.random() < MISTAKEN:
                    said = self.say(NEXT, place=another)
                    yield self.say(looking, kind=kind, said=said), f"go to {another}"
                said = self.say(NEXT if self.here else FIRST, place=place)
                yield from self.go(self.say(looking, kind=kind, said=said), place)
        thing = self.known(kind, target)
        if thing and self.seen[thing] != self.here:
            place = self.seen[thing]
            said = self.say(KNOWN, thing=thing, place=place)
            yield from self.go(self.say(looking, kind=kind, said=said), place)
        return thing

    def use(
        self, kind: str, target: str, options: tuple[str, ...], action: str
    ) -> Generator[Step, str, str]:
        """Finds one and does this with it."""
        thing = yield from self.find(kind, target, options, action)
        said = self.say(LOOK_FOR, kind=kind) + self.say(options, thing=thing)
        yield said, action.format(thing=thing, here=self.here)
        del self.seen[thing]
        return thing

    def bring(self, thing: str, target: str) -> Steps:
        place = next(p for p in self.places if p.split()[0] == target)
        if self.here != place:
            yield from self.go(self.say(BRING, thing=thing, place=place), place)
        yield self.say(PUT, thing=thing, place=place), f"put {thing} in/on {place}"
        self.seen[thing] = place

    def play(self) -> Steps:
        sort, asked = self.goal
        kind, target = asked["o"], asked.get("r", "")
        for _ in range(2 if sort == "two" else 1):
            # What has to be treated first may stand where it is to go.
            but = "" if sort == "treat" else target
            thing = yield from self.use(kind, but, FOUND, "take {thing} from {here}")
            if sort == "examine":
                yield from self.use(asked["lamp"], "", LIT, "use {thing}")
                return
            if sort == "treat":
                verb, where = TREATMENTS[asked["how"]]
                place = next(p for p in self.places if p.split()[0] == where)
                if self.here != place:
                    said = self.say(TREAT_GO, thing=thing, verb=verb, place=place)
                    yield from self.go(said, place)
                said = self.say(TREAT, place=place, verb=verb, thing=thing)
                yield said, f"{verb} {thing} with {place}"
            yield from self.bring(thing, target)


def explorer(seed: object) -> Policy:
    """Of one episode; `seed` draws its words. StopIteration, which ends it: it knows no further."""
    steps: Iterator[Step] | None = None
    purpose = ""

    def move(seen: str) -> Move:
        nonlocal steps, purpose
        if steps is None:
            agent = _Explorer(seen, random.Random(f"explorer {seed}"))
            steps, purpose = agent.play(), agent.goal.purpose
            thought, action = next(steps)
        else:
            thought, action = steps.send(seen)  # type: ignore[attr-defined]
        thought = purpose + thought
        return Move(thought, action, len(thought.split()), len(action.split()))

    return move
