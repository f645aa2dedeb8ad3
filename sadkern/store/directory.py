"""A store: a directory of shards, a manifest that lists them, and what is not sealed yet.

    manifest.json               identity, shards, a checksum of itself; replaced as a whole
    shards/NAME-HASH.safetensors
    parts/NAME/NUMBER-HASH.safetensors
                                a shard in the making, locked by the process that makes it

What a teacher has said is on disk when `Writer.add` returns, as a part; `Writer.seal` makes one
shard of the parts. A kill at any moment leaves a store that opens, and parts that the next writer
of that name goes on with. Any number of processes may write, each its own names.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sadkern.files import BusyError, clear_halves, hold, write_whole
from sadkern.store.codec import Columns
from sadkern.store.identity import Identity, IdentityError, digest
from sadkern.store.shard import SUFFIX, DamagedError, Shard, named, write_shard

logger = logging.getLogger(__name__)
SCHEMA = 1
MANIFEST = "manifest.json"


class Store:
    """Reads a store; `writer` adds to it.

    >>> import numpy as np, tempfile
    >>> from sadkern.store import Identity, Store, content_key
    >>> folder = tempfile.mkdtemp()
    >>> store = Store.create(folder, Identity("topk", k=1, temperature=1.0, vocab=9))
    >>> with store.writer("first") as writer:
    ...     part = writer.add([(content_key([5, 7]), {"position": np.array([0], np.int32)})])
    ...     writer.seal()
    >>> Store.open(folder).read(content_key([5, 7]))["position"].tolist()
    [0]
    """

    def __init__(self, path: Path, parts: bool):
        self.path, self.parts = path, parts
        self._files: set[str] = set()
        self._found: dict[bytes, tuple[Shard, int]] = {}
        self.refresh()
        self.identity = Identity(**self.manifest["identity"])

    @classmethod
    def open(cls, path: str | Path, *, parts: bool = False) -> Store:
        """`parts`: what is not sealed yet can be read too. FileNotFoundError: there is no store.
        DamagedError: its manifest or the index of a shard is not what was written."""
        return cls(Path(path), parts)

    @classmethod
    def create(cls, path: str | Path, identity: Identity, *, parts: bool = False) -> Store:
        """The store there, if it is of that identity, else a new one. IdentityError: of another."""
        path = Path(path)
        (path / "shards").mkdir(parents=True, exist_ok=True)
        with _locked(path):
            clear_halves(path)  # all that is written here is written under this lock
            if not (path / MANIFEST).exists():
                _write_manifest(path, {"identity": asdict(identity), "shards": {}})
        store = cls.open(path, parts=parts)
        store.require(identity)
        return store

    def require(self, asked: Identity) -> None:
        """IdentityError: this is not the signal `asked` for."""
        wrong = self.identity.differences(asked)
        if wrong:
            raise IdentityError(
                f"{self.path} holds another signal: {'; '.join(wrong)}. Expected the same, or "
                "another directory"
            )

    def __len__(self) -> int:
        """Trajectories."""
        return len(self._found)

    def __contains__(self, key: bytes) -> bool:
        return key in self._found

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._found)

    def read(self, key: bytes) -> Columns:
        """All columns of a trajectory. KeyError: it is not here. DamagedError: see `Shard.read`."""
        shard, i = self._found[key]
        return shard.read(i)

    def rows(self, key: bytes) -> int:
        """Supervised rows that are kept of a trajectory."""
        shard, i = self._found[key]
        return shard.rows(i)

    def positions(self, key: bytes) -> np.ndarray:
        """Of its supervised rows."""
        shard, i = self._found[key]
        return shard.positions(i)

    def covers(self, key: bytes, positions: np.ndarray) -> bool:
        """Whether those of a trajectory's rows are all here."""
        return key in self and bool(np.isin(positions, self.positions(key)).all())

    def writer(self, name: str) -> Writer:
        """BusyError: another process is at it."""
        return Writer(self, name)

    def refresh(self) -> None:
        """Sees what other processes have written since."""
        self.manifest = read_manifest(self.path)
        for name in self.manifest["shards"]:
            if name not in self._files:
                self.index(Shard(self.path / "shards" / name))
        for file in sorted(self.path.glob(f"parts/*/[0-9]*{SUFFIX}")) if self.parts else ():
            if file.name not in self._files:
                try:
                    self.index(Shard(file))
                except DamagedError:  # sealed and cleared away since it was listed, or to be redone
                    continue

    def leftovers(self, prefix: str = "") -> list[str]:
        """Names under `parts` that begin so: of writers that live, or that were killed."""
        folders = (self.path / "parts").glob(f"{prefix}*")
        return sorted(folder.name for folder in folders if folder.is_dir())

    def adopt(self, names: Iterable[str], *, discard: bool = False) -> None:
        """Seals what writers of those names had added when they were killed, or discards it. One
        that lives keeps its own."""
        for name in sorted(names):
            with suppress(BusyError), self.writer(name) as writer:
                if discard:
                    writer.discard()
                else:
                    writer.seal()

    def keep_head(self, data: bytes, facts: dict[str, Any]) -> None:
        """Puts a teacher's head, a file's bytes, beside its hidden states, once: of several
        processes that do, the first counts."""
        name = named("head", data)
        with changed_manifest(self.path) as manifest:
            if not manifest.get("head"):
                write_whole(self.path / name, data)
                manifest["head"] = {**facts, "file": name}
        self.refresh()

    def index(self, shard: Shard) -> None:
        """What is in it can be read from now on."""
        self._files.add(shard.path.name)
        for i, key in enumerate(shard.keys):
            # The record with more rows counts, where spans were drawn anew since; of equal ones
            # the later, so that no part is held on to that was sealed.
            if key not in self._found or self.rows(key) <= shard.rows(i):
                self._found[key] = shard, i


class Writer:
    """Writes one shard in parts. A context: leaving it gives the name free, sealed or not."""

    def __init__(self, store: Store, name: str):
        self.store, self.name = store, name
        self.folder = store.path / "parts" / name
        # Others clear away what they wrote, and `parts` with the last of it: not in between.
        with _locked(store.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.folder / "lock")
        store.refresh()  # it may have been sealed a moment ago
        self.parts: dict[bytes, tuple[Shard, int]] = {}
        self._next = 0
        for path in sorted(self.folder.glob(f"[0-9]*{SUFFIX}")):
            self._next = int(path.name.split("-")[0]) + 1
            try:
                part = Shard(path)
                part.verify()
            except DamagedError as error:
                logger.warning("%s; it is dropped and made again", error)
                path.unlink()
            else:
                self.parts.update({key: (part, i) for i, key in enumerate(part.keys)})

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def sealed(self) -> bool:
        return any(shard.rsplit("-", 1)[0] == self.name for shard in self.store.manifest["shards"])

    def add(self, records: Iterable[tuple[bytes, Columns]]) -> Shard:
        """On disk when this returns: the part that holds them."""
        if self.sealed:
            raise ValueError(f"{self.name} is sealed already: expected another name")
        part = Shard(write_shard(self.folder, f"{self._next:06d}", records))
        self._next += 1
        self.parts.update({key: (part, i) for i, key in enumerate(part.keys)})
        return part

    def read(self, key: bytes) -> Columns:
        """What was added. KeyError: that was not."""
        part, i = self.parts[key]
        return part.read(i)

    def seal(self, order: Iterable[bytes] | None = None) -> None:
        """Makes one shard of what was added, trajectories in `order`, and lists it."""
        keys = list(self.parts if order is None else order)
        if keys and not self.sealed:
            records = ((key, self.read(key)) for key in keys)
            # Beside the parts, not among them: its name may begin as theirs do.
            whole = self.folder / "whole"
            whole.mkdir(exist_ok=True)
            path = write_shard(whole, self.name, records)
            final = self.store.path / "shards" / path.name
            path.replace(final)
            shard = Shard(final)
            rows = sum(shard.rows(i) for i in range(len(keys)))
            facts = {"bytes": final.stat().st_size, "trajectories": len(keys), "rows": rows}
            with changed_manifest(self.store.path) as manifest:
                manifest["shards"][final.name] = facts
            self.store.refresh()
        self.discard()

    def discard(self) -> None:
        """Clears the parts away."""
        with _locked(self.store.path):
            shutil.rmtree(self.folder)
            with suppress(OSError):  # others are writing
                self.folder.parent.rmdir()


def read_manifest(path: Path) -> dict[str, Any]:
    """DamagedError, FileNotFoundError: as of `Store.open`."""
    file = path / MANIFEST
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} is no cache, it has no {MANIFEST}: expected the --output of `sadkern cache`"
        ) from None
    try:
        manifest = json.loads(text)
        # Byte for byte, so that a change which JSON would not see is seen too.
        whole = text == _manifest_text({k: v for k, v in manifest.items() if k != "checksum"})
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise DamagedError(f"{file} is damaged: it does not have its checksum")
    if manifest["schema"] != SCHEMA:
        raise ValueError(
            f"{file} is of schema {manifest['schema']}: expected {SCHEMA}, which this version of "
            "sadkern reads"
        )
    return manifest


def _manifest_text(manifest: dict[str, Any]) -> bytes:
    manifest = {**manifest, "checksum": digest(manifest)}
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    manifest = {k: v for k, v in manifest.items() if k != "checksum"}
    write_whole(path / MANIFEST, _manifest_text({**manifest, "schema": SCHEMA}))


@contextmanager
def changed_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """The manifest, to be changed; written when the context is left, one process at a time."""
    with _locked(path):
        manifest = read_manifest(path)
        yield manifest
        _write_manifest(path, manifest)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
