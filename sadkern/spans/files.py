"""Trajectories from files: JSON Lines, or one JSON array, compressed by gzip or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

GZIP, BOM = b"\x1f\x8b", b"\xef\xbb\xbf"


class Line(NamedTuple):
    """What a line holds, or the error that says why it cannot be read. `number`: of the line, or of
    the array's element, from 1."""

    number: int
    record: Any
    error: str | None = None


def read_lines(path: str | Path, progress: Callable[[int], None] | None = None) -> Iterator[Line]:
    """The records of a file in UTF-8, unchecked; empty lines are left out.

    A line that is not JSON does not keep the rest from coming. `progress` is told how many of the
    file's bytes have been read. FileNotFoundError: no such file.
    """
    with open(path, "rb") as raw:
        start = raw.read(2)
        raw.seek(0)
        # Bytes, so that a line which is not UTF-8 spoils itself and not its neighbours.
        file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if start == GZIP else raw
        try:
            number = 0
            for number, line in enumerate(_lines(file), 1):
                if isinstance(line, list):
                    yield from (Line(i, record) for i, record in enumerate(line, 1))
                elif line.strip():
                    yield _parsed(number, line)
                if progress is not None:
                    progress(raw.tell())
        except (EOFError, OSError, zlib.error) as error:  # of gzip
            yield Line(number + 1, None, f"the rest of the file cannot be read: {error}")


def _lines(file: IO[bytes]) -> Iterator[bytes | list[Any]]:
    """Its lines, or all at once the elements of an array."""
    first = file.readline()
    if not first.removeprefix(BOM).lstrip().startswith(b"["):
        yield first
        yield from file
        return
    whole = first + file.read()
    records = _parsed(1, whole).record
    if isinstance(records, list) and records and not _is_message(records[0]):
        yield records
    else:  # lines, the first of which is a chat
        yield from whole.splitlines(keepends=True)


def _parsed(number: int, text: bytes) -> Line:
    try:
        return Line(number, json.loads(text.decode("utf-8-sig")))
    except json.JSONDecodeError as error:  # (its own line is that of the text alone)
        return Line(number, None, f"{error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return Line(number, None, str(error))


def _is_message(record: Any) -> bool:
    return isinstance(record, dict) and ("role" in record or "from" in record)
