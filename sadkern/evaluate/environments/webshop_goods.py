"""A catalogue and goals of our own, of words drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sadkern.evaluate.environments.webshop import Goal, Product

MAKERS = ("Alder", "Brightway", "Corvid", "Dunmore", "Eastbay", "Fennel", "Greyson", "Hollow Oak",
          "Ironleaf", "Juniper")  # fmt: skip
ATTRIBUTES = (
    "easy to clean", "long lasting", "lightweight", "water resistant", "hand made", "non slip",
    "quick drying", "bpa free", "eco friendly", "heavy duty", "machine washable", "stainless steel",
)  # fmt: skip
KINDS: dict[str, dict[str, Sequence[str]]] = {
    "water bottle": {"color": ("black", "sea blue", "sand"), "size": ("16 oz", "24 oz", "32 oz")},
    "bath towel": {"color": ("white", "grey", "teal"), "size": ("hand", "bath", "sheet")},
    "desk lamp": {"color": ("brass", "matte black", "white")},
    "running shoe": {"color": ("red", "navy", "lime"), "size": ("7", "8", "9", "10", "11")},
    "backpack": {"color": ("olive", "charcoal", "rust"), "size": ("20 l", "30 l")},
    "yoga mat": {"color": ("plum", "forest", "stone")},
    "frying pan": {"size": ("8 inch", "10 inch", "12 inch")},
    "rain jacket": {"color": ("yellow", "slate", "moss"), "size": ("small", "medium", "large")},
    "pillow cover": {"color": ("ivory", "blush", "indigo"), "size": ("18 inch", "20 inch")},
    "phone stand": {"color": ("silver", "walnut", "black")},
}


def catalogue(count: int, seed: int = 0) -> list[Product]:
    """Products, the same for the same seed."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        kind = rng.choice(list(KINDS))
        attributes = tuple(rng.sample(ATTRIBUTES, 3))
        maker = rng.choice(MAKERS)
        options = {name: tuple(values) for name, values in KINDS[kind].items()}
        made.append(
            Product(
                asin=f"B{number:09d}",
                name=f"{maker} {kind.title()}, {attributes[0].title()}, No. {number}",
                price=round(rng.uniform(5, 90), 2),
                options=options,
                attributes=attributes,
                kind=kind,
                description=f"A {kind} by {maker}: {attributes[1]}.",
                features=tuple(attributes[1:]),
            )
        )
    return made


def goals(products: Sequence[Product], count: int, seed: int = 0) -> list[Goal]:
    """Each of a product drawn, with two of its attributes, its options and a price above its."""
    rng = random.Random(f"goals {seed}")
    made = []
    for number in range(count):
        product = rng.choice(list(products))
        attributes = tuple(rng.sample(list(product.attributes), 2))
        options = {kind: rng.choice(list(values)) for kind, values in product.options.items()}
        below = float(10 * (product.price // 10 + 1 + rng.randrange(3)))
        asked = "".join(f", {kind} {value}" for kind, value in options.items())
        instruction = (
            f"i need a {product.kind} that is {attributes[0]} and {attributes[1]}{asked}, and "
            f"price lower than {below:.2f} dollars"
        )
        name = f"{seed}-{number}"
        made.append(Goal(name, instruction, product.asin, attributes, options, below))
    return made
