"""How DistillKit packs a position's K tokens and values, as it does now and as it did before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np

from sadkern.teacher.imports.table import Array, Row, matrix

FLOATS = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Bin:
    """Residuals of the next `num_elements` values: whole numbers of few bits, times a scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the scale, and of the elements."""
        return _bytes(1, self.scale_dtype), -(-self.num_elements * self.element_bits // 8)


@dataclass(frozen=True)
class Bytes:
    """The format as it is now; the names are those of its config."""

    d: int
    k: int
    exact_k: int
    residual_bins: Sequence[Config]
    exact_dtype: str = "float32"
    polynomial_terms: Sequence[int | str] | None = None
    term_dtype: str = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    """of the encoder alone"""
    normalize_t: bool = False

    def __post_init__(self) -> None:
        _check(self, self.d)
        wrong = {self.exact_dtype, self.term_dtype, *(one.scale_dtype for one in self.bins)}
        wrong -= set(FLOATS)
        if wrong:
            raise ValueError(f"config: dtype {min(wrong)!r}: expected one of {', '.join(FLOATS)}")
        if not all(1 <= one.element_bits <= 32 for one in self.bins):
            raise ValueError("config: residual_bins have other than 1 to 32 element_bits")
        fitted = self.k - self.exact_k
        if sum(one.num_elements for one in self.bins) > fitted:
            raise ValueError(
                f"config: residual_bins have more elements than k - exact_k = {fitted}"
            )
        unknown = {x for x in self.polynomial_terms or () if not isinstance(x, int)}
        if unknown - {"sqrt", "exp"}:
            raise ValueError(
                f"config: polynomial_terms {list(self.polynomial_terms or ())}: expected whole "
                "numbers, 'sqrt' or 'exp'"
            )

    @property
    def vocab(self) -> int:
        return self.d

    @property
    def bins(self) -> list[Bin]:
        return [made(Bin, one) for one in self.residual_bins]

    def unpack(self, row: Row) -> tuple[Array, Array]:
        """ids int64 and values fp32 `[R, k]`."""
        width = (self.d - 1).bit_length()
        packed = matrix(row, "bytepacked_indices", np.uint8)
        _sized("bytepacked_indices", packed, -(-self.k * width // 8))
        return _fields(packed, self.k, width), self.values(
            matrix(row, "compressed_logprobs", np.uint8)
        )

    def values(self, packed: Array) -> Array:
        """fp32 `[R, k]` of bytes `[R, N]`, which DistillKit rounds to `exact_dtype` at the end."""
        terms = self.polynomial_terms or ()
        sizes = [_bytes(self.exact_k, self.exact_dtype), _bytes(len(terms), self.term_dtype)]
        sizes += [size for one in self.bins for size in one.sizes]
        _sized("compressed_logprobs", packed, sum(sizes))
        exact, coefficients, *residuals = np.split(packed, np.cumsum(sizes)[:-1], axis=1)
        fitted = self.k - self.exact_k
        t = np.linspace(0, 1, fitted) if self.normalize_t else np.arange(fitted, dtype=np.float64)
        fit = np.zeros((len(packed), fitted))
        if terms:
            fit += _floats(coefficients, self.term_dtype) @ np.stack([_term(x, t) for x in terms])
        begin = 0
        for one, scale, elements in zip(self.bins, residuals[::2], residuals[1::2], strict=True):
            whole = _fields(elements, one.num_elements, one.element_bits)
            # A single bit is a sign.
            whole = 2 * whole - 1 if one.element_bits == 1 else whole - (1 << one.element_bits - 1)
            end = begin + one.num_elements
            fit[:, begin:end] += whole * _floats(scale, one.scale_dtype)
            begin = end
        values = np.concatenate([_floats(exact, self.exact_dtype), fit], axis=1).astype(np.float32)
        if self.delta_encoding:
            with np.errstate(invalid="ignore"):
                values = np.cumsum(values, axis=1, dtype=np.float32)
            # Past an unfilled slot differences are of -inf to -inf, which are NaN.
            values[np.logical_or.accumulate(np.isneginf(values), axis=1)] = -np.inf
        return values


@dataclass(frozen=True)
class Words:
    """The format before; the names are those of its config."""

    k: int
    exact_k: int
    polynomial_degree: int
    vocab_size: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"
    """of the encoder alone: the table has them as fp32"""

    def __post_init__(self) -> None:
        _check(self, self.vocab_size)

    @property
    def vocab(self) -> int:
        return self.vocab_size

    def unpack(self, row: Row) -> tuple[Array, Array]:
        """ids int64 and values fp64 `[R, k]`, which are log-probabilities up to a constant there
        and of a mass of 1 here."""
        width = (self.vocab_size - 1).bit_length()
        per_word = 64 // width
        words = matrix(row, "packed_indices", np.uint64)
        _sized("packed_indices", words, -(-self.k // per_word))
        shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(width)
        ids = (words[:, :, None] >> shifts) & np.uint64((1 << width) - 1)
        ids = ids.reshape(len(words), -1)[:, : self.k].astype(np.int64)
        exact = matrix(row, "exact_values", np.float64)
        _sized("exact_values", exact, self.exact_k)
        coefficients = matrix(row, "coeffs", np.float64)
        powers = np.arange(self.polynomial_degree + 1)
        _sized("coeffs", coefficients, len(powers) + self.with_sqrt_term)
        a = np.arange(1.0, self.k - self.exact_k + 1)
        basis = [a ** (-i if self.invert_polynomial else i) for i in powers.astype(float)]
        if self.with_sqrt_term:
            basis.append(np.sqrt(a))
        values = np.concatenate([exact, coefficients @ np.stack(basis)], axis=1)
        return ids, values - np.logaddexp.reduce(values, axis=1, keepdims=True)


def made(kind: Any, config: Config) -> Any:
    """Of a config's keys. ValueError: one is missing, not known or not of its type."""
    if not isinstance(config, Mapping):
        raise ValueError(f"config: got {config!r}, expected keys and values")
    known = {field.name: field.default is MISSING for field in fields(kind)}
    missing = [name for name, required in known.items() if required and config.get(name) is None]
    unknown = [name for name in config if name not in known]
    if missing or unknown:
        raise ValueError(
            f"config: lacks {missing}, has {unknown} that is not known: expected {', '.join(known)}"
        )
    given = {name: value for name, value in config.items() if value is not None}
    for field in fields(kind):
        value = given.get(field.name, 0)
        if field.type == "int" and (not isinstance(value, int) or value < 0):
            raise ValueError(f"config: {field.name}={value!r}: expected a whole number")
    return kind(**given)


def _check(packing: Any, vocab: int) -> None:
    if not (0 <= packing.exact_k <= packing.k <= vocab and packing.k and 1 < vocab < 1 << 24):
        raise ValueError(
            f"config: a vocabulary of {vocab}, k={packing.k}, exact_k={packing.exact_k}: expected "
            "0 <= exact_k <= k <= the vocabulary < 2**24, and k above 0"
        )


def _sized(name: str, found: Array, width: int) -> None:
    if found.shape[1] != width:
        raise ValueError(
            f"{name} has {found.shape[1]} for each position: expected {width} by the config"
        )


def _bytes(count: int, dtype: str) -> int:
    return count * int(FLOATS[dtype][-1])


def _fields(packed: Array, count: int, width: int) -> Array:
    """int64 `[R, count]`: numbers of `width` bits, the highest first, of bytes `[R, N]`."""
    bits = np.unpackbits(packed, axis=1)[:, : count * width].reshape(len(packed), count, width)
    wide = np.zeros((len(packed), count, 32), np.uint8)
    wide[:, :, 32 - width :] = bits
    return np.packbits(wide, axis=-1).view(">u4")[:, :, 0].astype(np.int64)


def _floats(packed: Array, dtype: str) -> Array:
    """fp64 `[R, N / size]` of bytes `[R, N]`."""
    found = np.ascontiguousarray(packed).view(FLOATS[dtype])
    if dtype == "bfloat16":  # the upper half of an fp32
        found = (found.astype(np.uint32) << 16).view(np.float32)
    return found.astype(np.float64)


def _term(term: int | str, t: Array) -> Array:
    if term == "sqrt":
        return np.sqrt(t)
    return np.exp(t) if term == "exp" else t ** float(term)
