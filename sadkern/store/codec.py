"""A row's signal in few bytes: K tokens in 4.25 bytes each where the vocabulary has 18 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Columns = dict[str, np.ndarray]

# A log-probability is kept as round(asinh(-x) STEPS) in 16 bits: its error is at most
# sqrt(1 + x^2) / (2 STEPS), 9e-5 relative, a fifth of what a float16 of the same range has.
LOWEST = -65504.0
NO_MASS = 65535  # the code of -inf
STEPS = (NO_MASS - 1) / np.arcsinh(-LOWEST)
_LOGPROBS = -np.sinh(np.arange(NO_MASS + 1) / STEPS).astype(np.float32)
_LOGPROBS[NO_MASS] = -np.inf


def high_bits(vocab: int) -> int:
    """Bits of a token id above its lower 16; the highest id that fits says "no entry"."""
    for bits in (0, 2, 4, 8):
        if vocab < 1 << (16 + bits):
            return bits
    raise ValueError(f"a vocabulary of {vocab}: expected less than {1 << 24}")


def encode_topk(
    ids: Array, logprobs: Array, tail_mass: Array, entropy: Array, vocab: int
) -> Columns:
    """Columns of rows of `TopK`: ids and logprobs `[R, K]`, tail_mass and entropy `[R]`.

    Entries of id -1 after a row's last token take no room. ValueError: ids or numbers that are
    none; it names the row.
    """
    present = ids >= 0
    _refuse(ids.shape[0], (present & (ids >= vocab)).any(-1), f"an id of {vocab} or more")
    _refuse(ids.shape[0], np.isnan(logprobs).any(-1), "a log-probability that is NaN")
    width = ids.shape[1]
    count = width - present[:, ::-1].argmax(-1)
    count[~present.any(-1)] = 0
    kept = np.arange(width) < count[:, None]
    bits = high_bits(vocab)
    whole = np.where(present, ids, (1 << (16 + bits)) - 1).astype(np.uint32)
    code = np.arcsinh(np.maximum(-logprobs.astype(np.float64), 0))
    code = np.where(np.isneginf(logprobs), NO_MASS, np.minimum(np.rint(code * STEPS), NO_MASS - 1))
    columns = {
        "count": count.astype(np.uint16),
        "tail_mass": tail_mass.astype(np.float32),
        "entropy": entropy.astype(np.float32),
        "low": (whole & 0xFFFF).astype(np.uint16)[kept],
        "logprob": code.astype(np.uint16)[kept],
    }
    if bits:
        columns["high"] = _pack(whole >> 16, count, bits)
    return columns


def decode_topk(columns: Columns, vocab: int) -> tuple[Array, Array, Array]:
    """ids int32, logprobs fp32 `[R, K]` and tail_mass `[R]` of what `encode_topk` gave.

    K is the most that a row has; rows that have less are filled up with -1.

    Rounding is kept out of the sum: the K and the tail have a mass of 1, as they had before.
    """
    count = columns["count"].astype(np.int64)
    width = max(int(count.max(initial=0)), 1)
    bits = high_bits(vocab)
    none = (1 << (16 + bits)) - 1
    ids = _padded(columns["low"], count, width, none & 0xFFFF).astype(np.int32)
    if bits:
        ids |= _unpack(columns["high"], count, width, bits).astype(np.int32) << 16
    ids[ids == none] = -1
    logprobs = np.take(_LOGPROBS, _padded(columns["logprob"], count, width, NO_MASS))
    tail = columns["tail_mass"]
    total = np.exp(logprobs).sum(-1, dtype=np.float64)
    # A tail that holds most of the mass is the side that can take up the difference.
    heavy = (tail < 0.5) & (total > 0)
    shift = np.log(np.where(heavy, (1 - tail.astype(np.float64)) / np.where(heavy, total, 1), 1))
    logprobs += shift[:, None].astype(np.float32)
    return ids, logprobs, np.where(tail < 0.5, tail, np.maximum(1 - total, 0)).astype(np.float32)


def encode_hidden(hidden: Array) -> Columns:
    """Columns of last hidden states `[R, D]`: float16 times a power of two for each row."""
    largest = np.abs(hidden).max(-1, initial=0).astype(np.float64)
    _refuse(len(hidden), ~np.isfinite(largest), "a hidden state that is not finite")
    scale = np.exp2(np.ceil(np.log2(np.where(largest > 0, largest, 1))))
    return {
        "hidden": (hidden / scale[:, None]).astype(np.float16).ravel(),
        "scale": scale.astype(np.float32),
    }


def decode_hidden(columns: Columns) -> Array:
    """fp32 `[R, D]`."""
    scale = columns["scale"]
    return columns["hidden"].reshape(len(scale), -1) * scale[:, None]


def take(columns: Columns, kept: Array, vocab: int) -> Columns:
    """Those rows of all columns that the mask `kept [R]` has."""
    if kept.all():
        return columns
    per_row = dict.fromkeys(columns, np.ones(len(kept), np.int64))
    if "count" in columns:
        count = columns["count"].astype(np.int64)
        per_row.update(low=count, logprob=count)
        if "high" in columns:
            per_row["high"] = -(-count // (8 // high_bits(vocab)))
    else:
        per_row["hidden"] = np.full(len(kept), len(columns["hidden"]) // max(len(kept), 1))
    return {name: column[np.repeat(kept, per_row[name])] for name, column in columns.items()}


def bytes_per_row(width: int, vocab: int, *, hidden: bool = False) -> int:
    """Of a supervised token, all that is kept of it included: `width` entries, or hidden states."""
    if hidden:
        return 2 * width + 4 * 4  # scale, position, entropy, label_logprob
    return 4 * width + -(-width * high_bits(vocab) // 8) + 2 + 4 * 4


def _refuse(rows: int, wrong: Any, what: str) -> None:
    if wrong.any():
        raise ValueError(f"row {int(wrong.argmax())} of {rows} has {what}")


def _pack(values: Array, count: Array, bits: int) -> Array:
    """The lowest `bits` of values `[R, K]`, row after row, each from a byte of its own."""
    per_byte = 8 // bits
    rows, width = values.shape
    padded = np.zeros((rows, -(-width // per_byte) * per_byte), np.uint8)
    padded[:, :width] = values
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    packed = np.bitwise_or.reduce(padded.reshape(rows, -1, per_byte) << shifts, axis=-1)
    return packed[np.arange(packed.shape[1]) < -(-count[:, None] // per_byte)]


def _unpack(packed: Array, count: Array, width: int, bits: int) -> Array:
    per_byte = 8 // bits
    dense = _padded(packed, -(-count // per_byte), -(-width // per_byte), 0xFF)
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    values = (dense[:, :, None] >> shifts) & ((1 << bits) - 1)
    values = values.reshape(len(count), -1)[:, :width]
    # What lies past a row's end is "no entry", its last byte's spare bits too.
    return np.where(np.arange(width) < count[:, None], values, (1 << bits) - 1)


def _padded(flat: Array, count: Array, width: int, fill: int) -> Array:
    """Rows of `count` values each as `[R, width]`."""
    if (count == width).all():
        return flat.reshape(-1, width)
    dense = np.full((len(count), width), fill, flat.dtype)
    dense[np.arange(width) < count[:, None]] = flat
    return dense
