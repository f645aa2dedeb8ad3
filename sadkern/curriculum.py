"""From easy to hard: how difficult a trajectory is, and when it may be drawn.

    C = alpha |r| + beta |a| + gamma H                     equation (7) of the paper

with |r| and |a| a trajectory's [REASON] and [ACT] tokens and H its teacher's mean entropy there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

STEPS = 4
# Of what share of the trajectories is let in, from `start` to 1, as `progress` goes from 0 to 1.
PACINGS: dict[str, Callable[[float, float], float]] = {
    "none": lambda progress, start: 1.0,
    "linear": lambda progress, start: start + (1 - start) * progress,
    "root": lambda progress, start: math.sqrt(start**2 + (1 - start**2) * progress),
    "step": lambda progress, start: start + (1 - start) * math.floor(STEPS * progress) / STEPS,
}


def difficulty(
    reason: Sequence[float],
    act: Sequence[float],
    entropy: Sequence[float] | None = None,
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> list[float]:
    """C of each trajectory, equation (7), from its |r|, |a| and H.

    Tokens and nats have nothing in common: each term is standardised over the trajectories (mean 0,
    variance 1; all alike: 0), so that `weights` (alpha, beta, gamma) say what counts how much.
    ValueError: not as many of each, or a number that is not finite.

    >>> from sadkern.curriculum import difficulty
    >>> difficulty([10, 30], [4, 4], [0.25, 0.75])
    [-2.0, 2.0]
    >>> difficulty([10, 30], [4, 4], [0.25, 0.75], weights=(1, 1, 0.5))
    [-1.5, 1.5]
    """
    total = np.zeros(len(reason))
    terms = {"reason": reason, "act": act, "entropy": entropy}
    for (name, term), weight in zip(terms.items(), weights, strict=True):
        values = total if term is None else np.asarray(term, np.float64)
        if values.shape != total.shape or not np.isfinite(values).all():
            raise ValueError(
                f"{name} has {values.size} numbers, {int(np.isfinite(values).sum())} of them "
                f"finite: expected a finite one for each of {len(total)} trajectories"
            )
        apart = values - values.mean() if len(values) else values
        spread = np.sqrt(np.mean(apart**2)) if len(values) else 0.0
        if spread > 1e-12 * np.abs(values).max(initial=0):  # and not what rounding leaves
            total = total + weight * apart / spread
    return total.tolist()


class CurriculumSampler(Sampler[int]):
    """Draws trajectories at random from the easiest of them, a share that grows.

    None is drawn again before all that are let in were drawn, within an epoch. A linear pacing over
    one epoch gives each trajectory once, easy ones first; after the last of `epochs` an epoch is a
    plain shuffle. What is drawn depends on seed, epoch and difficulties alone: every process draws
    the same, and a resumed run goes on where it was.

    Args:
        difficulties: of each trajectory. pacing: one of `PACINGS`. epochs: until all are let in.
        start: the share that is let in at first. ValueError: one is out of its range.
    """

    def __init__(
        self,
        difficulties: Sequence[float],
        pacing: str = "linear",
        *,
        epochs: float = 1.0,
        start: float = 1 / 3,
        seed: int = 0,
    ):
        if pacing not in PACINGS:
            raise ValueError(f"curriculum={pacing!r}: expected one of {', '.join(PACINGS)}")
        if not epochs > 0:
            raise ValueError(f"curriculum_epochs={epochs}: expected a positive number")
        if not 0 < start <= 1:
            raise ValueError(f"curriculum_start={start}: expected above 0 and at most 1")
        self.pacing, self.epochs, self.start, self.seed = pacing, epochs, start, seed
        self.epoch = 0
        self.easiest = sorted(range(len(difficulties)), key=lambda i: (difficulties[i], i))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.easiest)

    def let_in(self, drawn: int) -> int:
        """How many are let in once `drawn` of the epoch are drawn."""
        count = len(self.easiest)
        progress = min((self.epoch + drawn / max(count, 1)) / self.epochs, 1.0)
        return math.ceil(PACINGS[self.pacing](progress, self.start) * count)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        left: list[int] = []
        known = 0
        for drawn in range(len(self)):
            count = self.let_in(drawn)
            left += self.easiest[known:count]
            known = count
            left = left or self.easiest[:known]
            i = rng.randrange(len(left))
            left[i], left[-1] = left[-1], left[i]
            yield left.pop()
