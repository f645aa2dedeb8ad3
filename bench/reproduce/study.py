"""What is compared, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Size(NamedTuple):
    """Heads are 32 wide."""

    width: int
    layers: int


SIZES = {"small": Size(64, 4), "middle": Size(96, 4), "large": Size(128, 4)}
TEACHER = Size(128, 5)
SEEDS = (0, 1, 2)

# Of ours: to be taught on, to know before, to measure KL.
GAMES, WANDERED, HELD_OUT = 1160, 1200, 40
GAMES_SEED = 0
ROOMS: dict[str, Any] = {"most": 2, "clutter": 0.3}  # smaller than ALFWorld's
MAX_LENGTH = 1024  # tokens of an episode that is learnt from
BASE_STEPS, TEACHER_STEPS, STUDENT_STEPS = 800, 600, 300
READ_AT_A_TIME, TAUGHT_AT_A_TIME = 8, 4  # episodes of a step
BASE_RATE, MUON_RATE, STUDENT_RATE = 1e-2, 0.05, 4e-3
PLAYED_AT_A_TIME, MAX_TURNS, MAX_INVALID, MAX_NEW_TOKENS = 24, 25, 5, 64

# Of each way of teaching: what it is called in a table, and what it sets. `peer` is TRL's trainer.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sad": ("SAD: spans (ours)", {}),
    "token": ("token-level KD: every token alike", {"segmentation": "all"}),
    "hard": ("hard labels: cross-entropy, same spans", {}),
    "reason": ("only reasoning", {"act_weight": 0.0}),
    "act": ("only actions", {"reason_weight": 0.0}),
    "flat": ("no span segmentation", {"segmentation": "flat"}),
    "random": ("random spans", {"segmentation": "random"}),
    "curriculum": ("SAD with curriculum", {"curriculum": "linear"}),
    "peer": ("TRL GKDTrainer", {}),
}
TABLE_3, TABLE_5 = ("sad", "token", "hard"), ("sad", "reason", "act", "flat", "random")
ABLATED = "middle"  # the size of all but Table 3
METRICS = ("success", "reasoning", "CoT match", "steps")
# On episodes held out, of each kind of span; what an evaluation calls it.
KL = {"reason KL": "eval_reason/kl", "act KL": "eval_act/kl"}


@dataclass(frozen=True)
class Cell:
    """One student."""

    method: str
    size: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.size}-{self.seed}"


CELLS = [
    Cell(method, size, seed)
    for seed in SEEDS
    for method in METHODS
    for size in SIZES
    if method in TABLE_3 or size == ABLATED
]


class Folder:
    """Where a run keeps what it makes."""

    def __init__(self, root: Path):
        self.root = root
        self.test_games = root / "test_games.jsonl"
        self.tokenizer, self.teacher, self.signal = (
            root / name for name in ("tokenizer", "teacher", "signal")
        )

    def episodes(self, kind: str, part: int) -> Path:
        """Of `kind`, explored or wandered."""
        return self.root / "episodes" / f"{kind}-{part}.jsonl"

    def base(self, size: str) -> Path:
        return self.root / "base" / size

    def half_done(self, name: str) -> Path:
        """What training of a model has come to."""
        return self.root / "half_done" / f"{name}.pt"

    def cell(self, name: str) -> Path:
        return self.root / "cells" / name

    def done(self, job: str) -> Path:
        return self.root / "jobs" / f"{job}.json"

    def log(self, job: str) -> Path:
        return self.root / "jobs" / f"{job}.log"
