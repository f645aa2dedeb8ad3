"""An agent for the encyclopaedia: it is given nothing but text, and reasons before every action."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator

from .agent import Move, Speaker, Steps
from .facts import KIND_OF_WORK

FIRST = (
    "I need to search {name} and find {first}, then {then}.",
    "First I search {name} to find {first}. After that I can find {then}.",
    "The question asks for {then}. I start with {name} to find {first}.",
)
NEXT = (
    "{fact} Now I search {name} to find {what}.",
    "{fact} Next I need {what}, so I search {name}.",
)
SIMILAR = (
    "There is more than one {name}. The question is about the {kind}, so I search that page.",
    "I have to choose between pages. I need the {kind}, so I search {title}.",
)
LOOK_UP = (
    "{fact} This part of the page does not say {what}, so I look up {word}.",
    "{fact} I do not see {what} here yet. I look up the word {word} on this page.",
)
FINISH = (
    "{fact} So the answer is {answer}.",
    "{fact} This answers the question, and the answer is {answer}.",
    "{fact} Now I know the answer, which is {answer}.",
)


class _Reader(Speaker):
    """Carries the page being read through the steps that every question is made of."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.page = ""

    def read(self, pattern: str) -> tuple[str, ...]:
        """What the open page says where it fits the pattern."""
        match = re.search(pattern, self.page)
        if match is None:
            raise LookupError(f"the page does not say {pattern!r}: {self.page!r}")
        return match.groups()

    def search(self, thought: str, name: str, kind: str = "") -> Steps:
        self.page = yield thought, f"Search[{name}]"
        title = f"{name} ({kind})"
        if title in self.page.partition("Similar: ")[2]:
            thought = self.say(SIMILAR, name=name, kind=kind, title=title)
            self.page = yield thought, f"Search[{title}]"

    def start(self, name: str, first: str, then: str, kind: str = "") -> Steps:
        yield from self.search(self.say(FIRST, name=name, first=first, then=then), name, kind)

    def go_on(self, fact: str, name: str, what: str) -> Steps:
        yield from self.search(self.say(NEXT, fact=fact, name=name, what=what), name)

    def look_up(self, fact: str, word: str, what: str) -> Steps:
        thought = self.say(LOOK_UP, fact=fact, word=word, what=what)
        self.page = yield thought, f"Lookup[{word}]"

    def finish(self, fact: str, answer: str) -> Steps:
        yield self.say(FINISH, fact=fact, answer=answer), f"Finish[{answer}]"

    def birth(self) -> tuple[str, ...]:
        """The town, country and year of birth on a person's page."""
        return self.read(r"born in (\w+), (\w+), in (\d+)\.")

    def maker(self, role: str, work: str, then: str) -> Generator[Move, str, str]:
        """Find who made a work, and open that person's page."""
        yield from self.start(work, f"its {role}", then, KIND_OF_WORK[role])
        (person,) = self.read(r" by (.+?)\.")
        yield from self.go_on(f"The {role} of {work} is {person}.", person, then)
        return person


def _maker_country(reader: _Reader, role: str, work: str) -> Steps:
    person = yield from reader.maker(role, work, f"where the {role} was born")
    town, country, _ = reader.birth()
    yield from reader.finish(f"{person} was born in {town}, which is in {country}.", country)


def _maker_year(reader: _Reader, role: str, work: str) -> Steps:
    person = yield from reader.maker(role, work, f"when the {role} was born")
    *_, year = reader.birth()
    yield from reader.finish(f"{person} was born in {year}.", year)


def _maker_subject(reader: _Reader, role: str, work: str) -> Steps:
    person = yield from reader.maker(role, work, f"what the {role} studied")
    yield from reader.look_up(f"This is {person}.", "studied", f"what the {role} studied")
    (subject,) = reader.read(r"studied (\w+)")
    yield from reader.finish(f"{person} studied {subject}.", subject)


def _maker_trade(reader: _Reader, role: str, work: str) -> Steps:
    person = yield from reader.maker(role, work, f"where the {role} was born")
    town, *_ = reader.birth()
    what = "what the town is known for"
    yield from reader.go_on(f"{person} was born in {town}.", town, what)
    yield from reader.look_up(f"This is the town of {town}.", "known", what)
    (trade,) = reader.read(r"known for its (\w+)")
    yield from reader.finish(f"{town} is known for its {trade}.", trade)


def _setting_country(reader: _Reader, kind: str, work: str) -> Steps:
    yield from reader.start(work, "where it is set", "the country of that town", kind)
    yield from reader.look_up(f"This is the {kind}.", "set", f"where the {kind} is set")
    (town,) = reader.read(r"set in the town of (\w+)")
    yield from reader.go_on(f"The {kind} is set in {town}.", town, "the country of that town")
    (country,) = reader.read(r"is a town in (\w+)")
    yield from reader.finish(f"{town} is a town in {country}.", country)


def _birth_capital(reader: _Reader, name: str) -> Steps:
    yield from reader.start(name, "the country of birth", "the capital of that country")
    _, country, _ = reader.birth()
    yield from reader.go_on(f"{name} was born in {country}.", country, "the capital")
    (capital,) = reader.read(r"capital is (\w+)")
    yield from reader.finish(f"The capital of {country} is {capital}.", capital)


def _birth_river(reader: _Reader, name: str) -> Steps:
    yield from reader.start(name, "the town of birth", "the river of that town")
    town, *_ = reader.birth()
    yield from reader.go_on(f"{name} was born in {town}.", town, "the river of that town")
    (river,) = reader.read(r"on the (River \w+)")
    yield from reader.finish(f"{town} is on the {river}.", river)


def _born_first(reader: _Reader, name: str, other: str) -> Steps:
    yield from reader.start(name, "the year of birth", f"the year of birth of {other}")
    *_, year = reader.birth()
    yield from reader.go_on(f"{name} was born in {year}.", other, "the other year of birth")
    *_, other_year = reader.birth()
    first = name if int(year) < int(other_year) else other
    early, late = sorted((year, other_year), key=int)
    fact = f"{other} was born in {other_year}, and {early} is before {late}."
    yield from reader.finish(fact, first)


def _river_length(reader: _Reader, town: str) -> Steps:
    yield from reader.start(town, "its river", "how long that river is")
    (river,) = reader.read(r"on the (River \w+)")
    yield from reader.go_on(f"{town} is on the {river}.", river, "how long the river is")
    (length,) = reader.read(r"is (\d+ km) long")
    yield from reader.finish(f"The {river} is {length} long.", length)


PLANS: tuple[tuple[str, Callable[..., Steps]], ...] = (
    (r"In which country was the (\w+) of (.+) born\?", _maker_country),
    (r"In what year was the (\w+) of (.+) born\?", _maker_year),
    (r"What did the (\w+) of (.+) study\?", _maker_subject),
    (r"What is the home town of the (\w+) of (.+) known for\?", _maker_trade),
    (r"In which country is the (\w+) (.+) set\?", _setting_country),
    (r"What is the capital of the country where (.+) was born\?", _birth_capital),
    (r"On which river is the town where (.+) was born\?", _birth_river),
    (r"Who was born first, (.+) or (.+)\?", _born_first),
    (r"How long is the river on which (.+) lies\?", _river_length),
)


def agent(task: str, observation: str, rng: random.Random) -> Steps:
    """Answer a question: yields a thought and an action, and is sent what follows from it."""
    for pattern, plan in PLANS:
        if match := re.fullmatch(pattern, task):
            return plan(_Reader(rng), *match.groups())
    raise ValueError(f"not a question for the encyclopaedia: {task!r}")
