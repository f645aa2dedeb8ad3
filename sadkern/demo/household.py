"""A household in the manner of ALFWorld: things lie in places, and a goal says where one must go.

`Household` is the world and alone judges success; `household_agent` plays it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import NamedTuple

# How many of each kind of place a room may have, at the least and at the most.
ROOMS = {
    "kitchen": {
        "cabinet": (1, 2),
        "countertop": (1, 2),
        "drawer": (1, 2),
        "fridge": (1, 1),
        "microwave": (1, 1),
        "shelf": (0, 2),
        "sink": (1, 1),
        "table": (0, 1),
    },
    "bathroom": {
        "bathtub": (1, 1),
        "cabinet": (1, 2),
        "drawer": (0, 1),
        "shelf": (1, 2),
        "sink": (1, 1),
    },
    "bedroom": {
        "bed": (1, 1),
        "desk": (1, 2),
        "drawer": (1, 2),
        "dresser": (0, 1),
        "shelf": (0, 2),
    },
    "living room": {
        "armchair": (0, 1),
        "drawer": (1, 1),
        "shelf": (0, 2),
        "sidetable": (1, 2),
        "sofa": (1, 1),
        "table": (1, 1),
    },
}

# Where people keep each kind of thing, the likeliest kind of place first. Both the world, which
# fills the rooms, and the agent, which searches them, go by this common sense.
HOMES = {
    "kitchen": {
        "mug": ("cabinet", "countertop", "shelf"),
        "cup": ("shelf", "cabinet", "table"),
        "plate": ("cabinet", "table", "countertop"),
        "bowl": ("cabinet", "shelf", "countertop"),
        "spoon": ("drawer", "countertop", "table"),
        "knife": ("drawer", "countertop", "table"),
        "pan": ("cabinet", "countertop", "shelf"),
        "apple": ("fridge", "table", "countertop"),
        "tomato": ("fridge", "countertop", "table"),
        "potato": ("countertop", "fridge", "cabinet"),
        "egg": ("fridge", "countertop", "table"),
        "lemon": ("fridge", "countertop", "table"),
    },
    "bathroom": {
        "towel": ("shelf", "cabinet", "bathtub"),
        "sponge": ("bathtub", "shelf", "cabinet"),
        "candle": ("shelf", "cabinet", "drawer"),
        "bottle": ("cabinet", "shelf", "bathtub"),
    },
    "bedroom": {
        "book": ("shelf", "desk", "bed"),
        "pen": ("desk", "drawer", "dresser"),
        "pencil": ("desk", "drawer", "shelf"),
        "phone": ("desk", "bed", "dresser"),
        "laptop": ("desk", "bed", "shelf"),
        "watch": ("drawer", "dresser", "desk"),
        "ring": ("drawer", "dresser", "shelf"),
        "clock": ("dresser", "shelf", "desk"),
        "notebook": ("desk", "shelf", "drawer"),
        "card": ("drawer", "desk", "shelf"),
    },
    "living room": {
        "newspaper": ("sofa", "table", "armchair"),
        "remote": ("sofa", "table", "drawer"),
        "vase": ("shelf", "table", "sidetable"),
        "statue": ("shelf", "sidetable", "table"),
        "magazine": ("table", "sofa", "armchair"),
        "letter": ("drawer", "table", "sidetable"),
        "photo": ("shelf", "drawer", "sidetable"),
        "key": ("drawer", "sidetable", "table"),
        "coin": ("drawer", "sofa", "sidetable"),
    },
}
LAMP = "desklamp"
LAMP_HOMES = ("desk", "sidetable", "dresser")

OPENABLE = ("cabinet", "drawer", "fridge", "microwave")
HOLLOW = (*OPENABLE, "sink", "bathtub")

# What each treatment makes of a thing, and the kind of place that does it.
TREATMENTS = {
    "clean": ("clean", "sink"),
    "heat": ("hot", "microwave"),
    "cool": ("cold", "fridge"),
}
TREATABLE = {
    "clean": "mug cup plate bowl spoon knife pan apple tomato potato towel sponge bottle".split(),
    "heat": "mug cup plate apple tomato potato egg".split(),
    "cool": "mug cup bowl apple tomato potato egg lemon".split(),
}
LONGEST = 11  # actions that a patient search may need in all; every goal has rooms within it


def article(words: str) -> str:
    """Put "a" or "an" in front.

    >>> article("egg"), article("mug")
    ('an egg', 'a mug')
    """
    return ("an " if words[0] in "aeiou" else "a ") + words


def listing(names: list[str]) -> str:
    """Join names as prose does.

    >>> listing(["mug 1", "pan 2", "cup 1"])
    'mug 1, pan 2 and cup 1'
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "nothing"


def kind_of(name: str) -> str:
    """The kind of a numbered thing or place."""
    return name.split()[0]


def at(place: str) -> str:
    """A place, or a kind of place, with the preposition that fits it."""
    return ("in " if any(word in HOLLOW for word in place.split()) else "on ") + place


def effort(places: list[str]) -> int:
    """The actions it takes to look through some places: those with a door have to be opened."""
    return sum(2 if kind_of(place) in OPENABLE else 1 for place in places)


class Goal(NamedTuple):
    """What is wanted: a kind of thing, treated or not, at a place or (examine) under a lamp."""

    verb: str
    kind: str
    place: str = ""

    def __str__(self) -> str:
        if self.verb == "examine":
            return f"examine {article(self.kind)} under the {LAMP}."
        return f"put {article(self.thing())} {at(self.place)}."

    @classmethod
    def parse(cls, task: str) -> Goal:
        """Read a goal back from its text."""
        if match := re.fullmatch(rf"examine an? (\w+) under the {LAMP}\.", task):
            return cls("examine", match[1])
        match = re.fullmatch(r"put an? (?:(clean|hot|cold) )?(\w+) (?:in|on) (\w+ \d+)\.", task)
        if match is None:
            raise ValueError(f"not a household goal: {task!r}")
        verbs = {adjective: verb for verb, (adjective, _) in TREATMENTS.items()}
        return cls(verbs.get(match[1], "put"), match[2], match[3])

    def thing(self) -> str:
        """The thing as the goal describes it, such as "clean mug"."""
        adjective, _ = TREATMENTS.get(self.verb, ("", ""))
        return f"{adjective} {self.kind}".strip()

    def likely(self, room: str, places: list[str]) -> list[str]:
        """The places where common sense looks for the thing, likeliest first."""
        homes = HOMES[room].get(self.kind, ())
        _, appliance = TREATMENTS.get(self.verb, ("", ""))
        return [
            place
            for home in homes
            for place in places
            if kind_of(place) == home != appliance and place != self.place
        ]


@dataclass
class Household:
    """A room with things in it; `start` maps each thing to its place when the episode begins."""

    goal: Goal
    room: str
    places: list[str]
    start: dict[str, str]
    ajar: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """The goal in words."""
        return str(self.goal)

    def reset(self) -> str:
        """Put everything back and describe the room."""
        self.where = dict(self.start)
        self.open = [place for place in self.places if kind_of(place) not in OPENABLE]
        self.open += self.ajar
        self.state: dict[str, str] = {}
        self.here = self.hand = self.lit = ""
        return f"You are in a {self.room}. You see {listing(self.places)}."

    def step(self, action: str) -> tuple[str, float, bool]:
        """Carry out one action, and say what is seen, the reward, and whether the goal is met."""
        observation = self._act(action)
        if not self.success():
            return observation, 0.0, False
        return f"{observation} Task complete.", 1.0, True

    def success(self) -> bool:
        """Whether the goal is met as things now stand."""
        if self.goal.verb == "examine":
            return bool(self.lit and self.hand) and kind_of(self.hand) == self.goal.kind
        wanted, _ = TREATMENTS.get(self.goal.verb, (None, ""))
        return any(
            kind_of(thing) == self.goal.kind
            and place == self.goal.place
            and wanted in (None, self.state.get(thing))
            for thing, place in self.where.items()
        )

    def _act(self, action: str) -> str:
        match action.split():
            case ["go", "to", kind, number] if f"{kind} {number}" in self.places:
                self.here, self.lit = f"{kind} {number}", ""
                return self._look()
            case ["open", kind, number] if f"{kind} {number}" == self.here not in self.open:
                self.open.append(self.here)
                return f"You open {self.here}. In it you see {listing(self._contents())}."
            case ["take", kind, number, "from", *place] if " ".join(place) == self.here:
                thing = f"{kind} {number}"
                if not self.hand and thing in self._contents() and kind != LAMP:
                    self.hand, self.where[thing] = thing, ""
                    return f"You take {thing} from {self.here}."
            case ["put", kind, number, "in" | "on", *place] if " ".join(place) == self.here:
                if self.hand == f"{kind} {number}" and self.here in self.open:
                    self.where[self.hand], self.hand = self.here, ""
                    return f"You put {kind} {number} {at(self.here)}."
            case ["clean" | "heat" | "cool" as verb, kind, number, "with", *place]:
                adjective, appliance = TREATMENTS[verb]
                ready = self.hand == f"{kind} {number}" and " ".join(place) == self.here
                if ready and kind_of(self.here) == appliance:
                    self.state[self.hand] = adjective
                    return f"You {verb} {self.hand} with {self.here}."
            case ["use", kind, number] if kind == LAMP and f"{kind} {number}" in self._contents():
                self.lit = f"{kind} {number}"
                held = f" and look at {self.hand}" if self.hand else ""
                return f"You turn on {self.lit}{held}."
        return "Nothing happens."

    def _contents(self) -> list[str]:
        """What can be seen and reached from here."""
        if self.here not in self.open:
            return []
        return [thing for thing, place in self.where.items() if place == self.here]

    def _look(self) -> str:
        if self.here not in self.open:
            return f"The {self.here} is closed."
        seen = listing(self._contents())
        if kind_of(self.here) in OPENABLE:
            return f"The {self.here} is open. In it you see {seen}."
        return f"{at(self.here).capitalize()} you see {seen}."


@cache
def goals(seed: int) -> list[Goal]:
    """Every goal, in an order drawn from the seed that takes the five sorts in turn."""
    sorts: dict[str, list[Goal]] = {"put": [], **{verb: [] for verb in TREATMENTS}, "examine": []}
    for room, things in HOMES.items():
        places = [f"{k} {i + 1}" for k, (_, most) in ROOMS[room].items() for i in range(most)]
        for kind in things:
            if room in ("bedroom", "living room"):
                sorts["examine"].append(Goal("examine", kind))
            for verb in ("put", *TREATMENTS):
                if verb == "put" or kind in TREATABLE[verb]:
                    sorts[verb] += [
                        Goal(verb, kind, place)
                        for place in places
                        if kind_of(place) not in ("microwave", "sink")
                        and not (kind_of(place) == "fridge" and verb in ("heat", "cool"))
                    ]
    rng = random.Random(f"household goals {seed}")
    for group in sorts.values():
        rng.shuffle(group)
    return [goal for turn in zip_longest(*sorts.values()) for goal in turn if goal]


def build(index: int, seed: int) -> Household:
    """The household of one goal: a room drawn for it, with the wanted thing hidden in it."""
    goal = goals(seed)[index]
    rng = random.Random(f"household {seed} {index}")
    room = next(room for room, things in HOMES.items() if goal.kind in things)
    closing = 3 + effort([goal.place]) - 1 if goal.place else 3
    closing += 2 if goal.verb in TREATMENTS else 0
    while True:
        places = [
            f"{kind} {number + 1}"
            for kind, (fewest, most) in ROOMS[room].items()
            for number in range(rng.randint(fewest, most))
        ]
        likely = goal.likely(room, places)
        lamp_places = [p for p in places if kind_of(p) in LAMP_HOMES and goal.verb == "examine"]
        searched = effort(list(dict.fromkeys(likely + lamp_places)))
        enough = len(likely) > 1 and (lamp_places or goal.place in places)
        if enough and closing + searched <= LONGEST:
            break
    hidden = [(f"{goal.kind} {rng.randint(1, 3)}", rng.choice(likely))]
    if lamp_places:
        hidden.append((f"{LAMP} 1", rng.choice(lamp_places)))
    for place in places:
        common = [k for k, homes in HOMES[room].items() if kind_of(place) in homes]
        for kind in rng.sample(common, min(len(common), rng.choice((0, 1, 1, 2)))):
            number = 1 + sum(kind_of(thing) == kind for thing, _ in hidden)
            if kind != goal.kind:
                hidden.append((f"{kind} {number}", place))
    rng.shuffle(hidden)
    ajar = tuple(p for p in places if kind_of(p) in ("cabinet", "drawer") and rng.random() < 0.2)
    return Household(goal, room, places, dict(hidden), ajar)
