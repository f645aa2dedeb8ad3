"""A shop in the manner of WebShop: search a catalogue, open pages, choose options and buy.

`Shop` is the world and alone judges success; `shop_agent` plays it.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

CLOTHES = ("small", "medium", "large")
BEDDING = ("single", "double")
# Each kind of article with its materials and its sizes, if it comes in sizes.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shirt": (("cotton", "linen", "silk"), CLOTHES),
    "jacket": (("leather", "wool", "cotton"), CLOTHES),
    "sweater": (("wool", "cotton", "fleece"), CLOTHES),
    "skirt": (("cotton", "linen", "silk"), CLOTHES),
    "coat": (("wool", "leather", "fleece"), CLOTHES),
    "blanket": (("wool", "cotton", "fleece"), BEDDING),
    "sheet": (("cotton", "linen", "silk"), BEDDING),
    "bed": (("steel", "beech", "pine"), BEDDING),
    "scarf": (("wool", "silk", "cotton"), ()),
    "hat": (("wool", "leather", "cotton"), ()),
    "bag": (("leather", "cotton", "linen"), ()),
    "lamp": (("glass", "steel", "clay"), ()),
    "bowl": (("glass", "clay", "steel"), ()),
    "chair": (("beech", "pine", "steel"), ()),
    "table": (("beech", "pine", "glass"), ()),
}
COLOURS = ("red", "blue", "green", "black", "white", "grey")
PER_PAGE = 3
NOTHING = "Nothing happens."


class Item(NamedTuple):
    """One entry of the catalogue."""

    code: str
    kind: str
    material: str
    price: int
    colours: tuple[str, ...]
    sizes: tuple[str, ...]

    def title(self) -> str:
        return f"[{self.code}] {self.material} {self.kind}, {self.price} dollars"

    def page(self) -> str:
        """What the item's own page shows; brackets mark what can be clicked."""
        colours = " ".join(f"[{colour}]" for colour in self.colours)
        sizes = " ".join(f"[{size}]" for size in self.sizes)
        options = f"Colour: {colours}." + (f" Size: {sizes}." if sizes else "")
        return f"{self.title()}. {options} [back] [buy now]"


class Goal(NamedTuple):
    """What to buy, and what it may cost at most."""

    kind: str
    material: str
    colour: str
    size: str
    limit: int

    def __str__(self) -> str:
        size = f" in size {self.size}" if self.size else ""
        what = f"{self.colour} {self.material} {self.kind}"
        return f"buy a {what}{size} for at most {self.limit} dollars."

    @classmethod
    def parse(cls, task: str) -> Goal:
        """Read a goal back from its text."""
        pattern = r"buy a (\w+) (\w+) (\w+)(?: in size (\w+))? for at most (\d+) dollars\."
        match = re.fullmatch(pattern, task)
        if match is None:
            raise ValueError(f"not a shopping goal: {task!r}")
        colour, material, kind, size, limit = match.groups(default="")
        return cls(kind, material, colour, size, int(limit))


@dataclass
class Shop:
    """A catalogue behind a search box."""

    goal: Goal
    catalogue: list[Item]

    @property
    def task(self) -> str:
        """The goal in words."""
        return str(self.goal)

    def reset(self) -> str:
        """Return to the front page with an empty basket."""
        self.query = ""
        self.results: list[Item] = []
        self.page = 0
        self.item: Item | None = None
        self.colour = self.size = ""
        self.bought: Item | None = None
        return "You are in the shop. You can search the catalogue with [search]."

    def step(self, action: str) -> tuple[str, float, bool]:
        """Carry out one action, and say what is shown, the reward, and whether it is over."""
        match = re.fullmatch(r"(search|click)\[(.+)\]", action)
        if match is None or self.bought:
            return NOTHING, 0.0, False
        observation = self._search(match[2]) if match[1] == "search" else self._click(match[2])
        if not self.success():
            return observation, 0.0, self.bought is not None
        return f"{observation} Task complete.", 1.0, True

    def success(self) -> bool:
        """Whether the article bought is the one the goal asks for."""
        if self.bought is None or self.bought.price > self.goal.limit:
            return False
        chosen = (self.bought.kind, self.bought.material, self.colour, self.size)
        return chosen == self.goal[:4]

    def _search(self, query: str) -> str:
        # The search box knows kinds of article only, so a shopper has to read the results.
        found = [item for item in self.catalogue if item.kind in query.split()]
        if not found:
            return f"No results for {query}."
        self.results, self.page, self.item = found, 0, None
        return self._show_results()

    def _click(self, button: str) -> str:
        if self.item is None:
            return self._click_result(button)
        if button == "back":
            self.item = None
            return self._show_results()
        if button == "buy now":
            self.bought = self.item
            choice = self.colour or "no colour"
            choice += f", size {self.size}," if self.size else ""
            return f"You buy {self.item.code} in {choice} for {self.item.price} dollars."
        if button in self.item.colours:
            self.colour = button
        elif button in self.item.sizes:
            self.size = button
        else:
            return NOTHING
        return f"You choose {button}."

    def _click_result(self, button: str) -> str:
        last = (len(self.results) - 1) // PER_PAGE
        step = {"next": 1, "previous": -1}.get(button, 0)
        if step and 0 <= self.page + step <= last:
            self.page += step
            return self._show_results()
        self.item = next((item for item in self._shown() if item.code == button), None)
        self.colour = self.size = ""
        return self.item.page() if self.item else NOTHING

    def _shown(self) -> list[Item]:
        return self.results[self.page * PER_PAGE : (self.page + 1) * PER_PAGE]

    def _show_results(self) -> str:
        pages = (len(self.results) - 1) // PER_PAGE + 1
        buttons = " [previous]" * (self.page > 0) + " [next]" * (self.page + 1 < pages)
        titles = "; ".join(item.title() for item in self._shown())
        return f"Page {self.page + 1} of {pages}: {titles}.{buttons}"


@cache
def catalogue(seed: int) -> list[Item]:
    """Two articles of each kind and material, in an order drawn from the seed."""
    rng = random.Random(f"shop catalogue {seed}")
    sorts = [(kind, material) for kind, (made_of, _) in KINDS.items() for material in made_of] * 2
    rng.shuffle(sorts)
    items = []
    for code, (kind, material) in zip(rng.sample(range(10, 100), len(sorts)), sorts, strict=True):
        colours = tuple(c for c in rng.sample(COLOURS, rng.randint(2, 3)))
        sizes = KINDS[kind][1]
        some = rng.sample(sizes, len(sizes) - rng.randint(0, 1)) if sizes else []
        sizes = tuple(size for size in sizes if size in some)
        items.append(Item(f"B{code}", kind, material, rng.randint(12, 60), colours, sizes))
    return items


@cache
def goals(seed: int) -> list[Goal]:
    """Every goal that the catalogue can meet, once each, in an order drawn from the seed."""
    rng = random.Random(f"shop goals {seed}")
    wanted = {
        (item.kind, item.material, colour, size): item.price
        for item in catalogue(seed)
        for colour in item.colours
        for size in item.sizes or ("",)
    }
    found = [Goal(*sort, price + rng.randint(0, 6)) for sort, price in wanted.items()]
    rng.shuffle(found)
    return found


def build(index: int, seed: int) -> Shop:
    """The shop with one goal; all goals of a seed share its catalogue."""
    return Shop(goals(seed)[index], catalogue(seed))
