"""Rows of parquet files and JSON Lines, and the arrays in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sadkern.spans.files import Line, read_lines

Array = NDArray[Any]
Row = Mapping[str, Any]
BATCH = 16  # sequences that are decompressed at a time


class Rows(NamedTuple):
    """What was captured of one sequence: of R of its positions K likely tokens each."""

    positions: Array
    """[R] int64, ascending: row p is the distribution of token p + 1; may lie outside"""
    ids: Array
    """[R, K] int64; -1: no entry"""
    logprobs: Array
    """[R, K] floating point; -inf: no entry"""


class Format(Protocol):
    """How a tool writes captures down."""

    columns: Sequence[str]
    """of a table, that are read"""

    @property
    def k(self) -> int | None:
        """Entries of a row, where the tool says it once for all."""

    @property
    def vocab(self) -> int | None:
        """As `k`."""

    def read(self, row: Row) -> Rows:
        """ValueError: it does not hold together; the message says why."""


def read_table(
    path: str | Path, columns: Sequence[str], progress: Callable[[int], None] | None = None
) -> Iterator[Line]:
    """The rows of a parquet file, its `columns` as arrays, or of JSON Lines as `read_lines` does.

    Rows count from 1. What cannot be read does not keep the rest from coming: of a parquet file a
    row group at least is lost. `progress` is told how many of the file's bytes have been read, by
    estimate. FileNotFoundError: no such file. RuntimeError: pyarrow is missing.
    """
    path = Path(path)
    with open(path, "rb") as raw:
        is_parquet = path.suffix == ".parquet" or raw.read(4) == b"PAR1"
    return _parquet(path, columns, progress) if is_parquet else read_lines(path, progress)


def _parquet(
    path: Path, columns: Sequence[str], progress: Callable[[int], None] | None
) -> Iterator[Line]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise RuntimeError(
            f"{path}: a parquet file needs pyarrow ({error}): expected `pip install "
            "'sadkern[import]'`"
        ) from None
    try:
        file = ParquetFile(path)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        names = [name for name in file.schema_arrow.names if name in columns]
    except (ArrowException, OSError) as error:
        yield Line(1, None, f"the file cannot be read: {error}")
        return
    size, total = path.stat().st_size, max(sum(groups), 1)
    number = end = 0
    for i, count in enumerate(groups):
        end += count
        try:
            for batch in file.iter_batches(BATCH, row_groups=[i], columns=names):
                for j in range(batch.num_rows):
                    number += 1
                    yield Line(number, {name: _plain(batch[name][j]) for name in names})
                    if progress is not None:
                        progress(size * number // total)
        except (ArrowException, OSError) as error:
            fault = f"row group {i} of {len(groups)} cannot be read: {error}"
            yield from (Line(lost, None, fault) for lost in range(number + 1, end + 1))
            number = end


def _plain(scalar: Any) -> Any:
    """Lists of numbers as arrays, lists of lists as a matrix or, ragged, as a list of arrays."""
    from pyarrow import types

    def is_list(kind: Any) -> bool:
        return types.is_list(kind) or types.is_large_list(kind)

    if not (scalar.is_valid and is_list(scalar.type)):
        return scalar.as_py()
    values = scalar.values
    if types.is_primitive(values.type):
        return values.to_numpy(zero_copy_only=False)
    if not (is_list(values.type) and types.is_primitive(values.type.value_type)):
        return scalar.as_py()
    if values.null_count:
        return scalar.as_py()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    lengths = values.value_lengths().to_numpy()
    if len(lengths) and (lengths == lengths[0]).all():
        return flat.reshape(len(lengths), lengths[0])
    return np.split(flat, np.cumsum(lengths)[:-1])


def vector(row: Row, name: str, dtype: Any = np.int64) -> Array:
    """A column's list `[N]`. ValueError: it is missing or none."""
    found = exact(_given(row, name), dtype, name)
    if found.ndim != 1:
        raise ValueError(f"{name} is not a list of numbers")
    return found


def matrix(row: Row, name: str, dtype: Any, fill: float | None = None) -> Array:
    """A column's list of lists `[R, K]`, shorter ones filled up with `fill`. ValueError: it is
    missing or none, or ragged where nothing fills up."""
    value = _given(row, name)
    if isinstance(value, np.ndarray) and value.ndim == 2:
        return exact(value, dtype, name)
    if isinstance(value, str | Mapping) or not hasattr(value, "__len__"):
        raise ValueError(f"{name} is not a list of lists of numbers")
    parts = [exact(part, dtype, name) for part in value]
    if any(part.ndim != 1 for part in parts):
        raise ValueError(f"{name} is not a list of lists of numbers")
    lengths = {len(part) for part in parts}
    if fill is None and len(lengths) > 1:
        raise ValueError(f"{name} has lists of {min(lengths)} to {max(lengths)}: expected one size")
    dense = np.full((len(parts), max(lengths, default=0)), 0 if fill is None else fill, dtype)
    for target, part in zip(dense, parts, strict=True):
        target[: len(part)] = part
    return dense


def exact(value: Any, dtype: Any, name: str) -> Array:
    """As an array of `dtype`. ValueError: those are no such numbers; whole ones are not rounded."""
    try:
        given = np.asarray(value)
        with np.errstate(invalid="ignore"):
            found = given.astype(dtype)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name} is not a list of numbers") from None
    if found.dtype.kind in "iu" and not np.array_equal(found, given):
        raise ValueError(f"{name} has numbers that are not of {found.dtype}")
    return found


def _given(row: Row, name: str) -> Any:
    value = row.get(name)
    if value is None:
        raise ValueError(f"no column {name!r} or nothing in it: got columns {', '.join(row)}")
    return value
