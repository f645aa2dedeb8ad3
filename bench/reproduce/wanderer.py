"""An agent for ALFWorld that says what its task is and does not know how: it looks for one thing
and then another, and does whatever can be done. Its episodes are what students know before they
are taught, as the paper's have read the web: the language of the place, to see what is there, and
that an action follows its thought; not what to do when."""

from __future__ import annotations

import random

from bench.reproduce.explorer import LOOK_FOR, NAME, goal_of, in_order
from sadkern.evaluate.environments.alfworld import ALFWorld
from sadkern.evaluate.play import Move, Policy
from sadkern.evaluate.scripted import Facts

# An action's verb, how often it is chosen over others, and what is said of it.
VERBS = {
    "go": (6, ("I go to {0}.",)),
    "open": (4, ("I open {0}.", "{0} is closed. I open it.")),
    "close": (0.3, ("I close {0}.",)),
    "take": (4, ("I take {0} from {1}.", "I take {0}.")),
    "put": (4, ("I put {0} in {1}.", "I put {0} here.")),
    "clean": (4, ("I clean {0} with {1}.", "I clean {0} here.")),
    "heat": (4, ("I heat {0} with {1}.", "I heat {0} here.")),
    "cool": (4, ("I cool {0} with {1}.", "I cool {0} here.")),
    "use": (4, ("I use {0}.", "I turn {0} on.")),
    "examine": (0.2, ("I examine {0}.",)),
    "look": (0.2, ("I look around.",)),
}
ON = 0.6  # the chance that it goes on to what comes after where it is
# For how many things it looks, as it begins, where it sees any and where it does not.
AT_FIRST, SEEING, ELSE = (2, 3), (2, 3, 4), (0, 1)
NUMBERED = 0.4  # the chance that it looks for one by its number
ASTRAY = 0.05  # the chance that it tries what is not there


def wanderer(env: ALFWorld, seed: object) -> Policy:
    """Of one episode."""
    rng = random.Random(f"wanderer {seed}")

    def looked(seen: str) -> str:
        """For what is here, for places, or for anything that is in the room."""
        first = "Your task is to" in seen
        here = [] if first else NAME.findall(seen.partition("you see ")[2])
        anything = sorted({thing.split()[0] for thing, _ in Facts(env).of["objecttype"]})
        said = ""
        for _ in range(rng.choice(AT_FIRST if first else SEEING if "you see" in seen else ELSE)):
            among = rng.choices((here, places, anything), (9 if here else 0, 4, 7))[0]
            kind = rng.choice(among).split()[0]
            known = [x for x in [*here, *places] if x.split()[0] == kind]
            if known and rng.random() < NUMBERED:
                kind = f"{kind} {rng.randint(1, len(known) + 1)}"
                known = [x for x in known if x == kind]
            found = known[0] if known else "none"
            said += rng.choice(LOOK_FOR).format(kind=kind) + f"I see {found}. "
        return said

    places: list[str] = []
    here, purpose = "", ""

    def move(seen: str) -> Move:
        nonlocal here, purpose
        if not places:
            room, _, task = seen.partition("Your task is to: ")
            places.extend(in_order(NAME.findall(room)))
            purpose = goal_of(task).purpose
        by_verb: dict[str, list[str]] = {}
        for action in env.admissible:
            by_verb.setdefault(action.split()[0], []).append(action)
        known = [verb for verb in by_verb if verb in VERBS]
        verb = rng.choices(known, [VERBS[verb][0] for verb in known])[0]
        action = rng.choice(by_verb[verb])
        doing = rng.choice(VERBS[verb][1]).format(*NAME.findall(action), "", "")
        if verb == "go" and here in places[:-1] and rng.random() < ON:
            place = places[places.index(here) + 1]
            action, doing = f"go to {place}", f"From {here} I go to {place}."
        elif verb != "look" and rng.random() < ASTRAY:
            name = NAME.findall(action)[0]
            wrong = f"{name.split()[0]} {rng.randint(6, 12)}"
            action, doing = (text.replace(name, wrong) for text in (action, doing))
        here = action.removeprefix("go to ") if verb == "go" else here
        said = purpose + looked(seen) + doing
        return Move(said, action, len(said.split()), len(action.split()))

    return move
