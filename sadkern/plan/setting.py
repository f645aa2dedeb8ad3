"""What is to be planned."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = {
    "full": "all of the student's weights are trained",
    "lora": "adapters at all of its matrices but the head",
}
SOURCES = {
    "online": "the teacher beside it, in bf16",
    "online-4bit": "the teacher beside it, its matrices in 4 bits (NF4)",
    "cached": "the teacher's most likely tokens, from a directory or a server",
    "hidden": "the teacher's last hidden states, from a directory, and its head",
    "served": "as cached",
}
OPTIMIZERS = {
    "adamw": "two states of each trained weight, in its dtype",
    "adamw8bit": "the same in 8 bits, in blocks of 256, rounded stochastically to bf16 weights",
}
GPUS = {"a6000": 48, "a100": 80, "h100": 80, "h200": 141, "rtx4090": 24, "l40s": 48}  # nominal GB


@dataclass(frozen=True)
class Setting:
    """One training step. Names of models are those of `models.MODELS` or folders."""

    student: str = "llama-7b"
    teacher: str = "llama-13b"
    method: str = "full"  # of METHODS
    teacher_source: str = "cached"  # of SOURCES
    optimizer: str = "adamw8bit"  # of OPTIMIZERS
    in_backward: bool = True  # gradients are consumed as they are made
    checkpointing: bool = True
    batch: int = 8
    seq_len: int = 512
    supervised: float = 1.0  # share of the tokens that carry a loss
    k: int = 64
    rank: int = 16  # of adapters
    gpus: int = 1  # each with a batch
    fsdp: bool = False  # they share the models' weights (FSDP2); else each has all (DDP)

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS),
            ("teacher_source", SOURCES),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}"
                )
        for name in ("batch", "seq_len", "k", "rank", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number")
        if not 0 < self.supervised <= 1:
            raise ValueError(
                f"supervised={self.supervised}: expected a share, above 0 and at most 1"
            )

        if self.fsdp and self.gpus == 1:
            raise ValueError("fsdp=True, gpus=1: expected more than one card to share weights")
        if self.gpus > 1 and self.in_backward:
            raise ValueError(
                f"in_backward=True, gpus={self.gpus}: expected in_backward=False, since gradients "
                "are first added up among cards"
            )

    @property
    def shares(self) -> int:
        """Parts that weights are in."""
        return self.gpus if self.fsdp else 1

    @property
    def likely(self) -> bool:
        """Whether the teacher says its most likely tokens alone."""
        return self.teacher_source in ("cached", "served")

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.batch * self.seq_len

    @property
    def rows(self) -> int:
        """Of those, supervised."""
        return max(1, round(self.supervised * self.tokens))
