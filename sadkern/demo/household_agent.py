"""An agent for the household: it is given nothing but text, and reasons before every action."""

from __future__ import annotations

import random
import re
from collections.abc import Generator

from .agent import Move, Speaker, Steps
from .household import LAMP, LAMP_HOMES, TREATMENTS, Goal, article, at, kind_of, listing

NAME = re.compile(r"[a-z]+ \d+")

FIRST = (
    "I need to find {a} first. {why}, so I start with {place}.",
    "First I have to find {a}. {why}, so I go to {place}.",
    "To begin, I look for {a}. I try {place}: {why_}.",
)
NEXT = (
    "There is no {kind} {here}. {why}, so I go to {place} next.",
    "I see {seen} {here}, but no {kind}. {why}, so I try {place}.",
    "The {kind} is not {here}. I look further and try {place}: {why_}.",
)
NEXT_EMPTY = (
    "There is nothing {here}. {why}, so I go to {place} next.",
    "I see nothing {here}, so I look for {a} further on. I try {place}: {why_}.",
)
CLOSED = (
    "The {place} is closed, so I cannot see inside. I open it to look for {a}.",
    "I cannot look into a closed {door}. I open {place} to see if {a} is there.",
)
FOUND = (
    "I can see {thing} {place}. I take it, because the goal asks for {a}.",
    "There is {thing}, which is what I was looking for. I take it.",
    "I have found {thing} {place}. Now I take it with me.",
)
TREAT_GO = (
    "I have {thing}. The goal asks for {a}, so I go to {place} to {verb} it.",
    "Now I hold {thing}. It must be {adjective} first, so I bring it to {place}.",
)
TREAT = (
    "I am at {place} with {thing}. I {verb} it here, since it must be {adjective}.",
    "Here I can {verb} {thing}. After that it can go to {target}.",
)
BRING = (
    "{lead}. The goal says to put it {target}, so I go there.",
    "{lead}. The next step is to bring it to {place}.",
)
LET_IN = (
    "The {place} is closed. I open it so that I can put {thing} inside.",
    "I have to open {place} before {thing} can go in.",
)
PUT = (
    "I am at {place} with {thing}. I put it {target} to meet the goal.",
    "This is where {thing} has to go. I put it {target} and then I am done.",
)
LAMP_NEXT = (
    "I have {thing}. Now I need {a} to look at it. {why}, so I go to {place}.",
    "Now I hold {thing} and have to find {a}. {why}, so I try {place}.",
)
LAMP_KNOWN = (
    "I have {thing}. I remember that {lamp} is {lamp_place}, so I go back there.",
    "Now I need light. I have seen {lamp} {lamp_place}, so I bring {thing} there.",
)
LAMP_HERE = (
    "I hold {thing}, and {lamp} is here too. I turn it on to examine the {kind}.",
    "Here is {lamp}, and {thing} is in my hand. I use the lamp to look at it.",
)


class _Agent(Speaker):
    """Searches likely places first, and remembers what it has seen where."""

    def __init__(self, task: str, observation: str, rng: random.Random) -> None:
        super().__init__(rng)
        self.goal = Goal.parse(task)
        self.room, seen = re.findall(r"You are in a (.+?)\. You see (.+)\.", observation)[0]
        self.places: list[str] = NAME.findall(seen)
        self.likely = {
            self.goal.kind: self.goal.likely(self.room, self.places),
            LAMP: [p for home in LAMP_HOMES for p in self.places if kind_of(p) == home],
        }
        self.seen: dict[str, str] = {}
        self.visited: list[str] = []
        self.here = ""

    def go(self, thought: str, place: str) -> Generator[Move, str, bool]:
        """Go to a place, note what is there, and tell whether it is closed."""
        observation = yield thought, f"go to {place}"
        self.here = place
        return self.note(observation)

    def open(self, thought: str) -> Steps:
        observation = yield thought, f"open {self.here}"
        self.note(observation)

    def note(self, observation: str) -> bool:
        self.visited.append(self.here)
        _, _, seen = observation.partition("you see ")
        self.seen.update(dict.fromkeys(NAME.findall(seen), self.here))
        return observation.endswith("is closed.")

    def known(self, kind: str) -> str:
        """A thing of this kind that has been seen, or nothing."""
        return next((thing for thing in self.seen if kind_of(thing) == kind), "")

    def find(
        self, kind: str, opening: tuple[str, ...], held: str = ""
    ) -> Generator[Move, str, str]:
        """Look through the places until a thing of this kind is seen."""
        while not self.known(kind):
            likely = self.likely[kind]
            place = next(p for p in likely + self.places if p not in self.visited)
            a = article(kind)
            why = f"{a} is often {at(article(kind_of(place)))}"
            if place not in likely:
                why = f"I have not looked {at(place)} yet"
            elif self.here and kind_of(self.here) == kind_of(place):
                why = f"there is another {kind_of(place)}"
            words = {"kind": kind, "a": a, "place": place, "thing": held}
            words |= {"why": why[0].upper() + why[1:], "why_": why}
            if opening is NEXT:
                here = [thing for thing, where in self.seen.items() if where == self.here]
                words |= {"here": at(self.here), "seen": listing(here)}
                opening = NEXT if here else NEXT_EMPTY
            is_closed = yield from self.go(self.say(opening, **words), place)
            if is_closed:
                door = kind_of(place)
                yield from self.open(self.say(CLOSED, place=place, door=door, a=a))
            opening = NEXT
        return self.known(kind)

    def play(self) -> Steps:
        goal = self.goal
        thing = yield from self.find(goal.kind, FIRST)
        thought = self.say(FOUND, thing=thing, place=at(self.here), a=article(goal.thing()))
        yield thought, f"take {thing} from {self.here}"
        del self.seen[thing]
        if goal.verb == "examine":
            yield from self.examine(thing)
            return
        lead = f"I have {thing} now"
        if goal.verb in TREATMENTS:
            yield from self.treat(thing)
            lead = f"Now {thing} is {TREATMENTS[goal.verb][0]}"
        words = {"thing": thing, "place": goal.place, "target": at(goal.place)}
        if self.here != goal.place:
            is_closed = yield from self.go(self.say(BRING, lead=lead, **words), goal.place)
            if is_closed:
                yield from self.open(self.say(LET_IN, **words))
        yield self.say(PUT, **words), f"put {thing} {at(goal.place)}"

    def treat(self, thing: str) -> Steps:
        verb, (adjective, appliance) = self.goal.verb, TREATMENTS[self.goal.verb]
        place = next(place for place in self.places if kind_of(place) == appliance)
        words = {"thing": thing, "place": place, "verb": verb, "adjective": adjective}
        words |= {"a": article(self.goal.thing()), "target": self.goal.place}
        if self.here != place:
            yield from self.go(self.say(TREAT_GO, **words), place)
        yield self.say(TREAT, **words), f"{verb} {thing} with {place}"

    def examine(self, thing: str) -> Steps:
        if lamp := self.known(LAMP):
            where = self.seen[lamp]
            if where != self.here:
                words = {"thing": thing, "lamp": lamp, "lamp_place": at(where)}
                yield from self.go(self.say(LAMP_KNOWN, **words), where)
        else:
            lamp = yield from self.find(LAMP, LAMP_NEXT, held=thing)
        yield self.say(LAMP_HERE, thing=thing, lamp=lamp, kind=self.goal.kind), f"use {lamp}"


def agent(task: str, observation: str, rng: random.Random) -> Steps:
    """Play a goal: yields a thought and an action, and is sent the observation that follows."""
    return _Agent(task, observation, rng).play()
