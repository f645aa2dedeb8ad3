"""WebShop in text: a shop with search, pages of products with options, and one purchase.

Pages read as in ReAct's recorded episodes, actions are search[..] and click[..], and the reward is
WebShop's: how much of what was asked for was bought. `pip install 'sadkern[webshop]'` brings the
search (BM25). Catalogue and goals are `webshop_goods`'s or one's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sadkern.evaluate.environments import Outcome

ACTION = re.compile(r"\s*(search|click|think)\s*\[(.*)\]?\s*", re.IGNORECASE | re.DOTALL)
SHOWN, FOUND = 3, 50  # results of a page, and of a search
SUBPAGES = ("Description", "Features", "Reviews")
INVALID = Outcome("Invalid action!", invalid=True)


@dataclass(frozen=True)
class Product:
    """`options`: of each kind, such as colour, what there is. `attributes` are what a goal can ask
    for; they are on no page but in the texts."""

    asin: str
    name: str
    price: float
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    attributes: Sequence[str] = ()
    kind: str = ""
    description: str = ""
    features: Sequence[str] = ()


@dataclass(frozen=True)
class Goal:
    """What is to be bought: `asin` is one product that is all of it."""

    id: str
    instruction: str
    asin: str
    attributes: Sequence[str] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    price_below: float = float("inf")


class Shop:
    """A catalogue and its search. ImportError: rank_bm25 is not installed."""

    def __init__(self, products: Sequence[Product]):
        try:
            from rank_bm25 import BM25Okapi
        except ImportError as error:
            raise ImportError(
                f"WebShop needs its search ({error}): expected `pip install 'sadkern[webshop]'`"
            ) from None
        self.products = list(products)
        self.by_asin = {product.asin.lower(): product for product in products}
        texts = (f"{x.name} {x.description} {' '.join(x.features)}" for x in products)
        self._index = BM25Okapi([words(text) for text in texts])

    def search(self, query: str) -> list[Product]:
        """The best first."""
        scores = self._index.get_scores(words(query))
        best = sorted(range(len(self.products)), key=lambda i: (-scores[i], i))
        return [self.products[i] for i in best[:FOUND]]


class WebShop:
    """`goal` in `shop`."""

    name = "webshop"

    def __init__(self, shop: Shop, goal: Goal):
        if goal.asin.lower() not in shop.by_asin:
            raise ValueError(f"goal {goal.id}: expected a product of the shop, got {goal.asin!r}")
        self.shop, self.goal, self.task = shop, goal, goal.id
        self.reset()

    def reset(self) -> str:
        self._results: list[Product] = []
        self._page = 0
        self._product: Product | None = None
        self._below = False  # on a page below the product's
        self._chosen: dict[str, str] = {}
        return self._start()

    def step(self, action: str) -> Outcome:
        read = ACTION.fullmatch(action)
        if read is None:
            return INVALID
        kind, said = read[1].lower(), read[2].strip().removesuffix("]").strip()
        if kind == "think":
            return Outcome("OK.")
        if kind == "search":
            if self._results or self._product is not None or not words(said):
                return INVALID
            self._results, self._page = self.shop.search(said), 0
            return Outcome(self._list())
        return self._click(said)

    @property
    def admissible(self) -> list[str]:
        """Clicks on what the page has, and at its beginning searches for what the goal says."""
        if self._product is not None:
            below = ["Back to Search", "< Prev"]
            options = [value for values in self._product.options.values() for value in values]
            said = below if self._below else [*below, *options, *SUBPAGES, "Buy Now"]
        elif self._results:
            turns = ["Next >"] if self._page + 1 < self._pages else []
            turns += ["< Prev"] if self._page else []
            said = ["Back to Search", *turns, *(x.asin for x in self._shown)]
        else:
            told = words(self.goal.instruction)
            return [f"search[{' '.join(told[i : i + 4])}]" for i in range(0, len(told), 2)]
        return [f"click[{name}]" for name in said]

    def close(self) -> None:
        pass

    @property
    def _pages(self) -> int:
        return -(-len(self._results) // SHOWN)

    @property
    def _shown(self) -> list[Product]:
        return self._results[self._page * SHOWN : (self._page + 1) * SHOWN]

    def _start(self) -> str:
        return f"\nWebshop \nInstruction:  \n{self.goal.instruction} \n[Search] \n"

    def _list(self) -> str:
        return results_page(self._shown, self._page, len(self._results))

    def _click(self, said: str) -> Outcome:
        name = said.lower()
        if name == "back to search" and (self._results or self._product):
            self._results, self._product, self._below = [], None, False
            return Outcome(self._start())
        product = self._product
        if product is None:
            if name == "next >" and self._page + 1 < self._pages:
                self._page += 1
                return Outcome(self._list())
            if name == "< prev" and self._page:
                self._page -= 1
                return Outcome(self._list())
            if any(name == shown.asin.lower() for shown in self._shown):
                self._product, self._chosen = self.shop.by_asin[name], {}
                return Outcome(item_page(self._product))
            return INVALID
        if name == "< prev":
            if self._below:
                self._below = False
                return Outcome(item_page(product))
            self._product = None
            return Outcome(self._list())
        if self._below:
            return INVALID
        if name == "buy now":
            score = reward(product, self._chosen, self.goal, self.shop)
            said = f"Your score (min 0.0, max 1.0): {score}"
            facts = {"bought": product.asin, "options": dict(self._chosen)}
            return Outcome(said, score, done=True, success=score == 1.0, facts=facts)
        if name in (subpage.lower() for subpage in SUBPAGES):
            self._below = True
            return Outcome(subpage(product, name))
        for kind, values in product.options.items():
            if name in (value.lower() for value in values):
                self._chosen[kind] = name
                return Outcome(f"You have clicked {said}.")
        return INVALID


def words(text: str) -> list[str]:
    """Of a text, for the search and for titles."""
    return re.findall(r"[a-z0-9]+", text.lower())


def results_page(shown: Sequence[Product], page: int, total: int) -> str:
    """Of a search."""
    lines = ["", "[Back to Search]", f"Page {page + 1} (Total results: {total})"]
    lines += ["[< Prev]"] if page else []
    lines += ["[Next >]"] if (page + 1) * SHOWN < total else []
    for product in shown:
        lines += [f"[{product.asin}]", product.name, _price(product)]
    return " \n".join(lines).removeprefix(" ") + " \n"


def item_page(product: Product) -> str:
    """Of a product."""
    lines = "\n[Back to Search] \n[< Prev] \n"
    for kind, values in product.options.items():
        lines += f"{kind} {''.join(f'[{value}]' for value in values)}\n"
    below = "".join(f"[{name}] \n" for name in SUBPAGES)
    return lines + (
        f"{product.name} \nPrice: {_price(product)} \nRating: N.A. \n{below}[Buy Now] \n"
    )


def subpage(product: Product, name: str) -> str:
    """Below a product's page."""
    texts = {"description": product.description, "features": " \n".join(product.features)}
    return f"\n[Back to Search] \n[< Prev] \n{texts.get(name, '')} \n"


def _price(product: Product) -> str:
    return f"${product.price}"


def reward(product: Product, chosen: Mapping[str, str], goal: Goal, shop: Shop) -> float:
    """WebShop's: kind of product x (attributes and options that are right, and whether the price
    is) / how many of these were asked for."""
    text = " ".join(words(f"{product.name} {product.description} {' '.join(product.features)}"))
    own = {" ".join(words(attribute)) for attribute in product.attributes}
    attributes = sum(
        " ".join(words(wanted)) in own or " ".join(words(wanted)) in text
        for wanted in goal.attributes
    )
    options = sum(
        chosen.get(kind, "").lower() == value.lower() for kind, value in goal.options.items()
    )
    cheap = product.price <= goal.price_below
    asked = len(goal.attributes) + len(goal.options) + 1
    wanted = shop.by_asin[goal.asin.lower()]
    return _same_kind(product, wanted) * (attributes + options + cheap) / asked


def _same_kind(product: Product, wanted: Product) -> float:
    """1 of the same kind or with more than a fifth of the title's words; less with fewer."""
    title = set(words(wanted.name))
    share = len(title & set(words(product.name))) / len(title)
    if (wanted.kind and product.kind == wanted.kind) or share > 0.2:
        return 1.0
    return 0.0 if share == 0 else 0.1 if share < 0.1 else 0.5
