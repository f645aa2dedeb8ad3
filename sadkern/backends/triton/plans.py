"""How a kernel goes about rows of a size on a chip: a table, where others search at import.

Every entry compiles for its chip without a spill, which a test holds; the table of what it takes is
bench/results/aot.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 4  # bytes of a register


class Choice(NamedTuple):
    """For one kernel and one way of reading rows."""

    tile: int  # entries, a power of two and at most 4096
    warps: int
    stages: int = 1  # groups that are being fetched or worked on at a time
    group: int = 1  # tiles that are looked at together
    registers: int | None = None  # of a thread at most, where the compiler would rather spill


class Plan(NamedTuple):
    """What a kernel is compiled for: the constants of row.py, and the compiler's own."""

    TILE: int
    TILES: int  # of a row that is kept on chip; 0: of one that is read in every sweep
    PACKED: bool
    GROUP: int
    STAGES: int
    num_warps: int
    maxnreg: int | None = None


# Registers, in bytes, that the rows kept by one program may take; a multiprocessor has 256 KiB.
ON_CHIP = {"state": 128 << 10, "mixture": 128 << 10, "span_kl_topk": 128 << 10}

# (kernel, whether rows are kept) -> Choice; of span_kl by what its gradient needs: the state alone,
# or one more sweep for the divergences of mixtures. A chip whose second-level cache holds the rows
# of all programs keeps none: what reads them again from there has time to spare for their
# arithmetic (measured on an H200, see bench/results), where keeping them takes moves.
Table = dict[tuple[str, bool], Choice]
SM_80: Table = {
    ("state", True): Choice(2048, 16, group=2),
    ("state", False): Choice(2048, 8, 3),
    ("mixture", True): Choice(2048, 16),
    ("mixture", False): Choice(1024, 8, 3),
    ("span_kl_topk", True): Choice(4096, 16),
    ("span_kl_topk", False): Choice(2048, 8, group=2),
    ("topk", False): Choice(1024, 4, group=2, registers=128),
    ("scale", False): Choice(4096, 8),
}
SM_90: Table = {
    ("state", False): Choice(2048, 4, 3),
    ("mixture", False): Choice(1024, 4),
    ("span_kl_topk", False): Choice(2048, 4, 3, registers=128),
    ("topk", False): Choice(1024, 4, group=2, registers=128),
    ("scale", False): Choice(4096, 8),
}
MANY = 256  # tokens of a top-k, for more of which a thread needs all of its registers
# Compute capability -> what serves it and those above, up to the next.
TABLES: dict[tuple[int, int], Table] = {(8, 0): SM_80, (9, 0): SM_90}
OLDEST = min(TABLES)

# Compute capability -> shared memory that a program may take, in bytes.
SHARED = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
}


def kind_of(divergence: str) -> str:
    """Which of the table's kernels a divergence of full distributions is."""
    return "state" if divergence in ("forward_kl", "reverse_kl") else "mixture"


def choose(
    kernel: str, capability: tuple[int, int], vocab: int, *sides: Tensor, tokens: int = 0
) -> Plan:
    """For rows of `vocab` entries; `sides` are the logits that are read, and their gradient;
    `tokens` those of a top-k."""
    table = TABLES[max(known for known in TABLES if known <= max(capability, OLDEST))]
    # (A gradient has the dtype of its logits, or else these are fp32.)
    packed = all(map(_holds_words, sides)) and vocab % 2 == 0
    read = 2 if kernel in ("state", "mixture") else 1
    fits = read * vocab * (WORD // 2 if packed else WORD) <= ON_CHIP.get(kernel, 0)
    kept = fits and (kernel, True) in table
    choice = table[kernel, kept]
    tile = min(choice.tile, max(128, power_of_two(vocab)))
    if kernel == "topk":  # were a tile's places fewer, its bound would be too low
        tile = max(tile, min(2 * power_of_two(tokens), 2048))
    registers = choice.registers and (choice.registers if tokens <= MANY else 255)
    warps = min(choice.warps, max(4, power_of_two(vocab) // 1024))
    group = min(choice.group, -(-vocab // tile))
    tiles = -(-vocab // (group * tile)) * group if kept else 0
    return Plan(tile, tiles, packed and kept, group, choice.stages, warps, registers)


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


def _holds_words(logits: Tensor) -> bool:
    """Whether each row is made of whole words of two entries."""
    return (
        logits.dtype.itemsize == 2
        and logits.data_ptr() % WORD == 0
        and all(stride % 2 == 0 for stride in logits.stride()[:-1])
    )


def capability_of(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; the oldest one served for what is interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST


def programs_on(device: torch.device, warps: int) -> int:
    """How many programs of so many warps share the rows of a kernel whose programs need memory of
    their own: as many as run at a time, or a few more."""
    if device.type != "cuda":
        return 3
    return max(1, 32 // warps) * torch.cuda.get_device_properties(device).multi_processor_count
