"""An agent for ALFWorld without a purpose: it does one thing after another that can be done, and
says what. Its episodes are what students know before they are taught, as the paper's have read the
web: the language of the place, and that an action follows its thought; not what to do when."""

from __future__ import annotations

import random
import re

from sadkern.evaluate.environments.alfworld import ALFWorld
from sadkern.evaluate.play import Move, Policy

# An action's verb, how often it is chosen over others, and what is said of it.
VERBS = {
    "go": (6, ("I go to {0}.", "I look at {0}.", "I try {0} next.")),
    "open": (4, ("I open {0}.", "{0} is closed. I open it.")),
    "close": (0.3, ("I close {0}.",)),
    "take": (4, ("I take {0} from {1}.", "Here is {0}. I take it.")),
    "put": (4, ("I put {0} in {1}.", "I am at {1}. I put {0} here.")),
    "clean": (4, ("I clean {0} with {1}.",)),
    "heat": (4, ("I heat {0} with {1}.",)),
    "cool": (4, ("I cool {0} with {1}.",)),
    "use": (4, ("I use {0}.", "Here is {0}. I turn it on.")),
    "examine": (0.2, ("I examine {0}.",)),
    "look": (0.2, ("I look around.",)),
}
NAME = re.compile(r"[a-z]+ \d+")
ASTRAY = 0.08  # the chance that it tries what is not there


def wanderer(env: ALFWorld, seed: object) -> Policy:
    """Of one episode."""
    rng = random.Random(f"wanderer {seed}")

    def move(seen: str) -> Move:
        by_verb: dict[str, list[str]] = {}
        for action in env.admissible:
            by_verb.setdefault(action.split()[0], []).append(action)
        known = [verb for verb in by_verb if verb in VERBS]
        verb = rng.choices(known, [VERBS[verb][0] for verb in known])[0]
        action = rng.choice(by_verb[verb])
        if rng.random() < ASTRAY:
            action = re.sub(r"\d+$", lambda _: str(rng.randint(6, 12)), action)
        said = rng.choice(VERBS[verb][1]).format(*NAME.findall(action), "", "")
        return Move(said, action, len(said.split()), len(action.split()))

    return move
