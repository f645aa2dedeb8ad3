"""Games for ALFWorld's engine, drawn from a seed: rooms, what stands and lies in them, and a task
of one of the six types, so that whoever has no games of ALFWorld's own can play too.

Kitchens, bedrooms, living rooms and bathrooms are furnished about as ALFWorld's are, with the
types of its objects, its rules of what can hold what, and its goals' wording.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

# Of each kind of receptacle, how many a room has: at the least and at the most.
ROOMS: dict[str, dict[str, tuple[int, int]]] = {
    "kitchen": {
        "Cabinet": (2, 8), "CoffeeMachine": (1, 1), "CounterTop": (1, 3), "DiningTable": (0, 1),
        "Drawer": (1, 5), "Fridge": (1, 1), "GarbageCan": (1, 1), "Microwave": (1, 1),
        "Shelf": (0, 3), "SideTable": (0, 1), "SinkBasin": (1, 1), "StoveBurner": (2, 4),
        "Toaster": (1, 1),
    },
    "bedroom": {
        "ArmChair": (0, 1), "Bed": (1, 1), "Desk": (1, 2), "Drawer": (2, 6), "Dresser": (0, 1),
        "GarbageCan": (1, 1), "LaundryHamper": (0, 1), "Safe": (0, 1), "Shelf": (1, 5),
        "SideTable": (0, 2),
    },
    "living room": {
        "ArmChair": (1, 2), "Cabinet": (0, 3), "CoffeeTable": (1, 1), "DiningTable": (0, 1),
        "Drawer": (2, 5), "Dresser": (0, 1), "GarbageCan": (1, 1), "Ottoman": (0, 1),
        "Safe": (0, 1), "Shelf": (0, 5), "SideTable": (1, 3), "Sofa": (1, 1), "TVStand": (0, 1),
    },
    "bathroom": {
        "BathtubBasin": (0, 1), "Cabinet": (1, 5), "CounterTop": (1, 1), "Drawer": (0, 4),
        "GarbageCan": (1, 1), "HandTowelHolder": (1, 2), "Shelf": (0, 2), "SinkBasin": (1, 2),
        "Toilet": (1, 1), "ToiletPaperHanger": (1, 1), "TowelHolder": (1, 1), "Cart": (0, 1),
    },
}  # fmt: skip
# What lies in a room; a lamp stands in it where one is needed.
THINGS = {
    "kitchen": "Apple Bowl Bread ButterKnife Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce "
    "Mug Pan PepperShaker Plate Pot Potato SaltShaker SoapBottle Spatula Spoon Tomato WineBottle",
    "bedroom": "AlarmClock Book Bowl CD CellPhone CreditCard KeyChain Laptop Mug Pen Pencil Pillow",
    "living room": "Book Box CellPhone CreditCard KeyChain Laptop Newspaper Pillow RemoteControl "
    "Statue TissueBox Vase Watch",
    "bathroom": "Candle Cloth HandTowel SoapBar SoapBottle SprayBottle TissueBox ToiletPaper Towel",
}
# Where each thing may be, the likeliest kind of receptacle first.
HOMES = {
    "AlarmClock": "Desk Shelf SideTable Dresser DiningTable CounterTop",
    "Apple": "Fridge CounterTop GarbageCan Microwave SinkBasin DiningTable SideTable",
    "Book": "Bed Desk Drawer Shelf Dresser CoffeeTable SideTable Sofa ArmChair DiningTable Cabinet",
    "Bowl": "Cabinet Fridge CounterTop Desk Shelf DiningTable SinkBasin SideTable Dresser "
    "Microwave CoffeeTable",
    "Box": "Sofa DiningTable CoffeeTable Dresser SideTable ArmChair Cabinet Shelf Ottoman Desk",
    "Bread": "CounterTop DiningTable Fridge Microwave SideTable GarbageCan",
    "ButterKnife": "CounterTop DiningTable Drawer SinkBasin SideTable",
    "CD": "Desk Drawer GarbageCan SideTable Shelf Dresser Safe Cabinet DiningTable CounterTop",
    "Candle": "Toilet CounterTop Cabinet Drawer Shelf Cart SideTable CoffeeTable DiningTable",
    "CellPhone": "Bed Desk SideTable Drawer Shelf Dresser CoffeeTable Sofa ArmChair DiningTable "
    "Safe CounterTop",
    "Cloth": "Cabinet BathtubBasin CounterTop Drawer SinkBasin Shelf Cart Toilet GarbageCan",
    "CreditCard": "Drawer Shelf SideTable Desk CoffeeTable ArmChair Dresser Sofa DiningTable Safe "
    "Ottoman CounterTop",
    "Cup": "Cabinet CounterTop Fridge SinkBasin DiningTable Microwave Shelf SideTable",
    "DishSponge": "CounterTop Cabinet Drawer SinkBasin DiningTable Shelf GarbageCan SideTable",
    "Egg": "Fridge CounterTop GarbageCan SinkBasin Microwave DiningTable SideTable",
    "Fork": "CounterTop Drawer DiningTable SinkBasin SideTable",
    "HandTowel": "HandTowelHolder CounterTop Cabinet Drawer SinkBasin Shelf Toilet Cart",
    "Kettle": "StoveBurner CounterTop Cabinet DiningTable SinkBasin Shelf SideTable",
    "KeyChain": "Drawer SideTable Desk Safe Shelf Dresser CoffeeTable Sofa ArmChair DiningTable "
    "Ottoman CounterTop",
    "Knife": "CounterTop Drawer DiningTable SinkBasin SideTable",
    "Ladle": "CounterTop Drawer DiningTable Cabinet SinkBasin",
    "Laptop": "Bed Desk Sofa ArmChair CoffeeTable DiningTable Dresser SideTable Ottoman",
    "Lettuce": "CounterTop Fridge DiningTable SinkBasin GarbageCan SideTable",
    "Mug": "CounterTop Cabinet CoffeeMachine Fridge Desk DiningTable SideTable Shelf Microwave "
    "SinkBasin Dresser",
    "Newspaper": "Sofa SideTable Dresser Shelf CoffeeTable DiningTable ArmChair Drawer Cabinet "
    "Ottoman GarbageCan",
    "Pan": "StoveBurner CounterTop Cabinet Fridge DiningTable SinkBasin SideTable",
    "Pen": "Desk Drawer Shelf SideTable Dresser DiningTable CoffeeTable GarbageCan CounterTop",
    "Pencil": "Desk Drawer Shelf SideTable Dresser DiningTable CoffeeTable GarbageCan CounterTop",
    "PepperShaker": "CounterTop Cabinet Drawer DiningTable Shelf SideTable",
    "Pillow": "Bed Sofa ArmChair Ottoman",
    "Plate": "Cabinet CounterTop DiningTable Fridge Shelf SinkBasin Microwave SideTable "
    "CoffeeTable",
    "Pot": "StoveBurner CounterTop Fridge DiningTable Cabinet Shelf SinkBasin SideTable",
    "Potato": "CounterTop Fridge SinkBasin Microwave DiningTable GarbageCan SideTable",
    "RemoteControl": "Sofa Dresser ArmChair CoffeeTable SideTable DiningTable Drawer Shelf Desk "
    "Ottoman CounterTop",
    "SaltShaker": "Cabinet Drawer CounterTop DiningTable Shelf SideTable",
    "SoapBar": "CounterTop Toilet SinkBasin Cabinet BathtubBasin Shelf GarbageCan Drawer Cart",
    "SoapBottle": "CounterTop Cabinet Toilet GarbageCan Shelf DiningTable Drawer Cart SideTable",
    "Spatula": "CounterTop Drawer DiningTable SinkBasin SideTable",
    "Spoon": "CounterTop Drawer SinkBasin DiningTable SideTable",
    "SprayBottle": "CounterTop Cabinet Toilet GarbageCan Shelf Cart Drawer SideTable Dresser",
    "Statue": "Shelf SideTable CoffeeTable DiningTable Dresser Desk Safe CounterTop",
    "TissueBox": "SideTable Shelf DiningTable Cabinet CoffeeTable Dresser Toilet CounterTop "
    "Drawer Cart TVStand GarbageCan",
    "ToiletPaper": "Toilet Cabinet CounterTop ToiletPaperHanger GarbageCan Shelf Drawer Cart",
    "Tomato": "CounterTop Fridge DiningTable SinkBasin GarbageCan Microwave SideTable",
    "Towel": "TowelHolder",
    "Vase": "Shelf CoffeeTable SideTable Dresser DiningTable Cabinet Desk Safe CounterTop",
    "Watch": "Dresser SideTable CoffeeTable Drawer DiningTable Shelf Safe Desk",
    "WineBottle": "CounterTop DiningTable Cabinet GarbageCan Shelf Fridge SideTable",
    "DeskLamp": "Desk SideTable Dresser Shelf DiningTable",
}
OPENABLE = "Cabinet Drawer Fridge Microwave Safe".split()
CLEANABLE = (
    "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce Mug Pan Plate "
    "Pot Potato SoapBar Spatula Spoon Tomato".split()
)
HEATABLE = "Apple Bread Cup Egg Mug Plate Potato Tomato".split()
COOLABLE = "Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato WineBottle".split()
KNOWN_AS = {"cleanable": CLEANABLE, "heatable": HEATABLE, "coolable": COOLABLE}


class Sort(NamedTuple):
    """Of task. `wordings` of its goal; `done`: what must be true of an object {o} in a receptacle;
    `able`: of what objects there are such tasks, by `KNOWN_AS`; `rooms` that have what it needs."""

    wordings: tuple[str, ...]
    rooms: tuple[str, ...] = tuple(ROOMS)
    able: str = ""
    done: str = ""


SORTS = {
    "pick_and_place_simple": Sort(("put a {o} in {r}.", "put some {o} on {r}.")),
    "look_at_obj_in_light": Sort(
        ("look at {o} under the desklamp.", "examine the {o} with the desklamp."),
        ("bedroom", "living room"),
    ),
    "pick_clean_then_place_in_recep": Sort(
        ("put a clean {o} in {r}.", "clean some {o} and put it in {r}."),
        ("kitchen", "bathroom"), "cleanable", "isClean",
    ),
    "pick_heat_then_place_in_recep": Sort(
        ("put a hot {o} in {r}.", "heat some {o} and put it in {r}."),
        ("kitchen",), "heatable", "isHot",
    ),
    "pick_cool_then_place_in_recep": Sort(
        ("put a cool {o} in {r}.", "cool some {o} and put it in {r}."),
        ("kitchen",), "coolable", "isCool",
    ),
    "pick_two_obj_and_place": Sort(("put two {o} in {r}.", "find two {o} and put them in {r}.")),
}  # fmt: skip
LOOK, TWO = "look_at_obj_in_light", "pick_two_obj_and_place"
CLUTTER = 0.6  # the chance of each other thing to lie in the room


def game(
    seed: int, index: int, *, most: int | None = None, clutter: float = CLUTTER
) -> dict[str, Any]:
    """The game of that number, its type by turns; a seed's games differ in all that is drawn.

    `most`: receptacles of a kind, at most, for rooms smaller than ALFWorld's; `clutter`: the chance
    of each other thing to lie there.
    """
    rng = random.Random(f"alfworld {seed} {index}")
    kind = list(SORTS)[index % len(SORTS)]
    sort = SORTS[kind]
    room = rng.choice(sort.rooms)
    stands = [
        f"{name.removesuffix('Basin')}_bar_{number}" + f"_bar_{name}" * name.endswith("Basin")
        for name, (least, as_many) in ROOMS[room].items()
        for number in range(1, min(most or as_many, rng.randint(least, as_many)) + 1)
    ]
    kinds = sorted({_type(place) for place in stands})
    things = THINGS[room].split()
    # What has two kinds of home here at least: one to be found in, another to be brought to.
    fit = [o for o in things if len(_homes(o, kinds)) > 1]
    fit = [o for o in fit if not sort.able or o in KNOWN_AS[sort.able]]
    wanted = rng.choice(fit)
    target = "" if kind == LOOK else rng.choice(_homes(wanted, kinds))
    lies: dict[str, str] = {}

    def put(thing: str, count: int, homes: list[str]) -> None:
        weights = [1 / (1 + rank) for rank in range(len(homes))]
        for number in range(1, count + 1):
            home = rng.choices(homes, weights)[0]
            place = rng.choice([place for place in stands if _type(place) == home])
            lies[f"{thing}_bar_{number}"] = place

    put(wanted, 2 if kind == TWO else rng.randint(1, 2), _homes(wanted, kinds, target))
    for other in things:
        if other != wanted and rng.random() < clutter:
            put(other, rng.randint(1, 2), _homes(other, kinds) or kinds)
    if kind == LOOK:
        put("DeskLamp", 1, _homes("DeskLamp", kinds))
    goal = rng.choice(sort.wordings).format(o=wanted.lower(), r=target.lower())
    lamp = "DeskLamp" if kind == LOOK else ""
    return {
        "id": f"{kind}-{wanted}-None-{target or lamp}-made/{seed}-{index}",
        "split": "made",
        "task_type": kind,
        "goal": goal,
        "pddl_params": {
            "object_target": wanted, "parent_target": target, "toggle_target": lamp,
            "mrecep_target": "", "object_sliced": False,
        },
        "pddl_problem": _problem(kind, wanted, target, stands, lies),
    }  # fmt: skip


def _type(instance: str) -> str:
    """A basin is named last: Sink_bar_1_bar_SinkBasin."""
    names = instance.split("_bar_")
    return names[-1] if len(names) > 2 else names[0]


def _homes(thing: str, kinds: list[str], but: str = "") -> list[str]:
    """Of the kinds that stand here."""
    return [home for home in HOMES[thing].split() if home in kinds and home != but]


def _problem(kind: str, wanted: str, target: str, stands: list[str], lies: dict[str, str]) -> str:
    """In PDDL. A receptacle is a place by itself, and the agent begins at one that has none."""
    things, kinds = sorted({_type(o) for o in lies}), sorted({_type(r) for r in stands})
    at = {place: f"loc_bar_{number}" for number, place in enumerate(stands, 1)}
    objects = [
        "agent1 - agent", "loc_bar_0 - location",
        *(f"{o}Type - otype" for o in things), *(f"{r}Type - rtype" for r in kinds),
        *(f"{o} - object" for o in lies), *(f"{r} - receptacle" for r in stands),
        *(f"{location} - location" for location in at.values()),
    ]  # fmt: skip
    facts: list[tuple[str, ...]] = [("atLocation", "agent1", "loc_bar_0")]
    for place in stands:
        facts += [("receptacleType", place, f"{_type(place)}Type")]
        facts += [("receptacleAtLocation", place, at[place])]
        facts += [("openable", place)] * (_type(place) in OPENABLE)
    for thing, place in lies.items():
        facts += [("objectType", thing, f"{_type(thing)}Type"), ("inReceptacle", thing, place)]
        facts += [("objectAtLocation", thing, at[place])]
        facts += [("toggleable" if _type(thing) == "DeskLamp" else "pickupable", thing)]
        facts += [(able, thing) for able, of in KNOWN_AS.items() if _type(thing) in of]
    for thing in things:
        facts += [("canContain", f"{home}Type", f"{thing}Type") for home in _homes(thing, kinds)]
    init = [f"({' '.join(fact)})" for fact in facts]
    return (
        f"(define (problem made)\n(:domain alfred)\n(:objects\n{_lines(objects)}\n)\n"
        f"(:init\n{_lines(init)}\n)\n(:goal {_goal(kind, wanted, target)}))\n"
    )


def _lines(said: list[str]) -> str:
    return "\n".join(f"    {line}" for line in said)


def _goal(kind: str, wanted: str, target: str) -> str:
    if kind == LOOK:
        return (
            "(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and "
            "(objectType ?ot DeskLampType) (toggleable ?ot) (isToggled ?ot) "
            "(receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r))) "
            f"(exists (?o - object ?a - agent) (and (objectType ?o {wanted}Type) (holds ?a ?o))))"
        )
    names = ("?o1", "?o2") if kind == TWO else ("?o1",)
    done = SORTS[kind].done
    facts = [f"(receptacleType ?r {target}Type)"] + ["(not (= ?o1 ?o2))"] * (kind == TWO)
    for name in names:
        facts += [f"(objectType {name} {wanted}Type)", f"(inReceptacle {name} ?r)"]
        facts += [f"({done} {name})"] if done else []
    declared = " ".join(f"{name} - object" for name in names)
    return f"(exists (?r - receptacle {declared}) (and {' '.join(facts)}))"
