"""A small encyclopaedia in the manner of HotPotQA: questions whose answer takes two pages.

`Facts` is the world and alone judges success; `facts_agent` plays it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

from .household import article

FIRST_NAMES = "Ada Bruno Clara David Elsa Felix Greta Hugo Ida Jonas".split()
LAST_NAMES = "Brenner Castel Duval Eklund Falk Gruber Holm Lindt Moreau Novak Olsen Petri".split()
TITLES = (
    "Glass Silent Winter Golden Broken Hidden Northern Paper".split(),
    "Harbour Garden Mirror Letter Island Clock Bridge Forest".split(),
)
TOWNS = "Arvel Belmar Corvin Dorna Estwick Fennel Galdo Hartum Irwen Jarrow Kelda Lindal".split()
TOWNS += "Marsk Norby Orlan Pellin Quenby Rosmer".split()
RIVERS = "Alva Brisk Cale Dene Eider Fulda Glim Hadle Isk".split()
COUNTRIES = {
    "Norway": "Oslo",
    "Portugal": "Lisbon",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Finland": "Helsinki",
    "Ireland": "Dublin",
    "Hungary": "Budapest",
    "Denmark": "Copenhagen",
}
SUBJECTS = ("law", "medicine", "history", "physics", "music", "botany")
TRADES = ("glass", "cheese", "clocks", "ships", "paper", "wool")
# A kind of work, the role of its maker, the maker's profession, and how it came before the public.
WORKS = (
    ("novel", "author", "novelist", "published"),
    ("film", "director", "film director", "released"),
    ("opera", "composer", "composer", "first performed"),
)
KIND_OF_WORK = {role: kind for kind, role, _, _ in WORKS}
TITLED, SHARED = 36, 6  # titles in all, and how many of them name two works
ON_PAGE = 2  # sentences that Search shows; Lookup finds the others


class Person(NamedTuple):
    name: str
    role: str
    town: str
    year: int
    subject: str


class Work(NamedTuple):
    title: str
    kind: str
    maker: Person
    setting: str


class Town(NamedTuple):
    country: str
    river: str
    trade: str


class Knowledge(NamedTuple):
    """The pages by title, each a list of sentences, and the records they were written from."""

    pages: dict[str, list[str]]
    people: list[Person]
    works: list[Work]
    towns: dict[str, Town]
    lengths: dict[str, int]


@dataclass
class Facts:
    """A question, its answer, and an encyclopaedia to find it in."""

    task: str
    answer: str
    pages: dict[str, list[str]]

    def reset(self) -> str:
        """Close every page and ask the question."""
        self.page: list[str] = []
        self.looked_up = ""
        self.hits: list[str] = []
        self.total = 0
        return self.task

    def step(self, action: str) -> tuple[str, float, bool]:
        """Carry out one action, and say what is shown, the reward, and whether it is over."""
        match = re.fullmatch(r"(Search|Lookup|Finish)\[(.+)\]", action)
        if match is None:
            return "Nothing happens.", 0.0, False
        verb, words = match.groups()
        if verb == "Finish":
            return "Episode finished.", float(words == self.answer), True
        return self._search(words) if verb == "Search" else self._look_up(words), 0.0, False

    def _search(self, title: str) -> str:
        self.page, self.looked_up = self.pages.get(title, []), ""
        if self.page:
            return " ".join(self.page[:ON_PAGE])
        similar = [name for name in self.pages if title in name]
        return f"Could not find {title}." + f" Similar: {', '.join(similar)}." * bool(similar)

    def _look_up(self, keyword: str) -> str:
        # The same keyword again goes on to the next sentence that holds it.
        if keyword != self.looked_up:
            self.looked_up = keyword
            self.hits = [line for line in self.page if keyword.lower() in line.lower()]
            self.total = len(self.hits)
        if not self.hits:
            return "No more results."
        return f"(Result {self.total - len(self.hits) + 1} / {self.total}) {self.hits.pop(0)}"


@cache
def knowledge(seed: int) -> Knowledge:
    """Write an encyclopaedia of invented people, works, towns and rivers."""
    rng = random.Random(f"facts knowledge {seed}")
    towns = {
        town: Town(rng.choice(list(COUNTRIES)), rng.choice(RIVERS), rng.choice(TRADES))
        for town in TOWNS
    }
    lengths = dict(zip(RIVERS, rng.sample(range(40, 400), len(RIVERS)), strict=True))
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    titles = [f"The {one} {two}" for one in TITLES[0] for two in TITLES[1]]
    rng.shuffle(titles)
    people, works = [], []
    for number, name in enumerate(rng.sample(names, TITLED + SHARED)):
        kind, role, _, _ = WORKS[number % len(WORKS)]
        subject, year = rng.choice(SUBJECTS), rng.randint(1880, 1979)
        people.append(Person(name, role, rng.choice(TOWNS), year, subject))
        # The last works take the titles of earlier works of another kind.
        title = titles[number if number < TITLED else number - TITLED + 1]
        works.append(Work(title, kind, people[-1], rng.choice(TOWNS)))
    pages = _write(people, works, towns, lengths, rng)
    return Knowledge(pages, people, works, towns, lengths)


def _write(
    people: list[Person],
    works: list[Work],
    towns: dict[str, Town],
    lengths: dict[str, int],
    rng: random.Random,
) -> dict[str, list[str]]:
    pages: dict[str, list[str]] = {}
    titles = [work.title for work in works]
    public = {kind: (role, verb) for kind, _, role, verb in WORKS}
    for title, kind, maker, setting in works:
        name = f"{title} ({kind})" if titles.count(title) > 1 else title
        pages[name] = [
            f"{title} is {article(kind)} by {maker.name}.",
            f"It was {public[kind][1]} in {maker.year + rng.randint(25, 60)}.",
            f"The story is set in the town of {setting}.",
        ]
    for person in people:
        surname = person.name.split()[-1]
        birth = f"born in {person.town}, {towns[person.town].country}, in {person.year}"
        pages[person.name] = [
            f"{person.name} is a {public[KIND_OF_WORK[person.role]][0]} {birth}.",
            f"In later years {surname} lived in {rng.choice(TOWNS)}.",
            f"{surname} studied {person.subject} at the university.",
        ]
    for town, (country, river, trade) in towns.items():
        pages[town] = [
            f"{town} is a town in {country} on the River {river}.",
            f"About {rng.randint(11, 99)} thousand people live there.",
            f"The town is known for its {trade}.",
        ]
    for country, capital in COUNTRIES.items():
        pages[country] = [f"{country} is a country in Europe.", f"Its capital is {capital}."]
    for river, length in lengths.items():
        pages[f"River {river}"] = [
            f"The River {river} is a river in Europe.",
            f"It is {length} km long.",
        ]
    return pages


@cache
def questions(seed: int) -> list[tuple[str, str]]:
    """Every question with its answer, in an order drawn from the seed that takes sorts in turn."""
    known = knowledge(seed)
    towns = known.towns
    sorts: list[list[tuple[str, str]]] = [[] for _ in range(9)]
    for title, kind, maker, setting in known.works:
        role, home = maker.role, towns[maker.town]
        for sort, pair in zip(
            sorts,
            (
                (f"In which country was the {role} of {title} born?", home.country),
                (f"In what year was the {role} of {title} born?", str(maker.year)),
                (f"What did the {role} of {title} study?", maker.subject),
                (f"What is the home town of the {role} of {title} known for?", home.trade),
                (f"In which country is the {kind} {title} set?", towns[setting].country),
            ),
            strict=False,
        ):
            sort.append(pair)
    for person, other in zip(known.people, known.people[1:] + known.people[:1], strict=True):
        name, country = person.name, towns[person.town].country
        capital, river = COUNTRIES[country], towns[person.town].river
        sorts[5].append((f"What is the capital of the country where {name} was born?", capital))
        sorts[6].append((f"On which river is the town where {name} was born?", f"River {river}"))
        if person.year != other.year:
            first = min(person, other, key=lambda one: one.year).name
            sorts[7].append((f"Who was born first, {name} or {other.name}?", first))
    for town, (_, river, _) in towns.items():
        length = f"{known.lengths[river]} km"
        sorts[8].append((f"How long is the river on which {town} lies?", length))
    rng = random.Random(f"facts questions {seed}")
    for group in sorts:
        rng.shuffle(group)
    return [pair for turn in zip_longest(*sorts) for pair in turn if pair]


def build(index: int, seed: int) -> Facts:
    """The encyclopaedia with one question; all questions of a seed share it."""
    question, answer = questions(seed)[index]
    return Facts(question, answer, knowledge(seed).pages)
