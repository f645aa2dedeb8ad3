"""What the three agents are made of."""

from __future__ import annotations

import random
from collections.abc import Generator

Move = tuple[str, str]  # a thought and the action it leads to
Steps = Generator[Move, str, None]  # of an episode: yields moves, is sent what follows from each


class Speaker:
    """Puts what it has to say in one of several ways."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def say(self, options: tuple[str, ...], **words: str) -> str:
        return self.rng.choice(options).format(**words)
