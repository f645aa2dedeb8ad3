"""One file of a store: named columns of numbers for each of many trajectories.

A safetensors file: `keys [N, 16]`, `offsets [C, N + 1]` into each of C columns, `checksums [N]`,
and the columns. Its name ends in a hash of its bytes; beside that each trajectory has a checksum of
its own, which every reading compares, so that damage is met where it is and not spread.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sadkern.files import write_whole
from sadkern.store.codec import Columns

SUFFIX = ".safetensors"
INDEX = ("keys", "offsets", "checksums")
KEY_BYTES = 16


class DamagedError(ValueError):
    """A file of a store is not what was written; the message names it."""


def content_key(input_ids: ArrayLike) -> bytes:
    """A trajectory's key: a hash of its token ids, whatever batch or order they come in."""
    return hashlib.sha256(np.asarray(input_ids).astype("<i8").tobytes()).digest()[:KEY_BYTES]


class Shard:
    """Reads a file, memory-mapped. DamagedError: it cannot be one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            # No context: it stays mapped as long as this object lives.
            self._file = safe_open(path, framework="np")
            index = [self._file.get_tensor(name) for name in INDEX]
            checksum, *self.columns = (self._file.metadata() or {})["index"].split()
            sizes = [self._file.get_slice(name).get_shape()[0] for name in self.columns]
        except (SafetensorError, OSError, KeyError, IndexError, ValueError) as error:
            raise DamagedError(f"{path} is damaged: {type(error).__name__} {error}") from error
        keys, self.offsets, self.checksums = index
        if checksum != _index_checksum(index, self.columns):
            raise DamagedError(f"{path} is damaged: its index does not have its checksum")
        if self.offsets[:, -1].tolist() != sizes:
            raise DamagedError(
                f"{path} is damaged: its columns are {sizes} long, and its index says "
                f"{self.offsets[:, -1].tolist()}"
            )
        self.keys = [key.tobytes() for key in keys]
        # Reading a slice of a column: a handle each, made once.
        self._slices = {name: self._file.get_slice(name) for name in self.columns}

    def rows(self, i: int) -> int:
        """Of trajectory i."""
        offsets = self.offsets[self.columns.index("position")]
        return int(offsets[i + 1] - offsets[i])

    def positions(self, i: int) -> np.ndarray:
        """The supervised rows of trajectory i, unchecked."""
        offsets = self.offsets[self.columns.index("position")]
        return self._slices["position"][int(offsets[i]) : int(offsets[i + 1])]

    def read(self, i: int) -> Columns:
        """The columns of trajectory i. DamagedError: they are not what was written."""
        found = {}
        for name, offsets in zip(self.columns, self.offsets, strict=True):
            found[name] = self._slices[name][int(offsets[i]) : int(offsets[i + 1])]
        if _checksum(self.keys[i], found) != self.checksums[i]:
            raise DamagedError(
                f"{self.path} is damaged: trajectory {i} of {len(self.keys)} "
                f"({self.keys[i].hex()}) does not have its checksum"
            )
        return found

    def verify(self) -> None:
        """DamagedError: any byte differs from what was written."""
        checked(self.path)
        for i in range(len(self.keys)):
            self.read(i)


def write_shard(folder: Path, stem: str, records: Iterable[tuple[bytes, Columns]]) -> Path:
    """Writes trajectories by key in one file, whole or not at all; its path is returned."""
    keys, given = zip(*records, strict=True)
    names = sorted(given[0])
    parts = {name: [columns[name] for columns in given] for name in names}
    sizes = [[len(part) for part in parts[name]] for name in names]
    index = {
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
        "offsets": np.concatenate(
            [np.zeros((len(names), 1), np.int64), np.cumsum(sizes, axis=1, dtype=np.int64)], axis=1
        ),
        "checksums": np.array(
            [_checksum(key, columns) for key, columns in zip(keys, given, strict=True)], np.uint32
        ),
    }
    # One entry: of several the library writes now this first, now that, and equal shards are to be
    # equal files.
    checksum = _index_checksum([index[name] for name in INDEX], names)
    metadata = {"index": " ".join([checksum, *names])}
    data = save({**index, **{n: np.concatenate(part) for n, part in parts.items()}}, metadata)
    path = folder / named(stem, data)
    write_whole(path, data)
    return path


def named(stem: str, data: bytes) -> str:
    """A file's name that ends in a hash of its bytes, by which `checked` knows them again."""
    return f"{stem}-{_hash(data)}{SUFFIX}"


def checked(path: Path) -> bytes:
    """The bytes of a file that has such a name. DamagedError: they are others, or gone."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path} is damaged or gone: {error}") from error
    found, expected = _hash(data), path.stem.split("-")[-1]
    if found != expected:
        raise DamagedError(f"{path} is damaged: its hash is {found}, not that of its name")
    return data


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _checksum(key: bytes, columns: Columns) -> int:
    total = zlib.crc32(key)
    for name in sorted(columns):
        total = zlib.crc32(np.ascontiguousarray(columns[name]).data, total)
    return total


def _index_checksum(index: Sequence[np.ndarray], columns: list[str]) -> str:
    parts = [np.ascontiguousarray(x).tobytes() for x in index]
    return _hash(b"".join([*parts, " ".join(columns).encode()]))
