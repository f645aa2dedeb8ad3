"""Looking after stores: is one whole, what is in it, several made one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sadkern.store.codec import Columns
from sadkern.store.directory import Store, changed_manifest, read_manifest
from sadkern.store.identity import digest
from sadkern.store.shard import DamagedError, Shard, checked

SHARD_BYTES = 128 << 20
MERGED = "merge-"  # shards that a merge made
Progress = Callable[[Iterable[Any]], Iterable[Any]]


def verify(path: str | Path, progress: Progress = iter) -> list[str]:
    """What is wrong with a store, in words, each naming its file; nothing: every byte of it is as
    it was written. FileNotFoundError: there is no store.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return [str(error)]
    faults = []
    for name in progress(sorted(manifest["shards"])):
        fault = _fault(path / "shards" / name)
        if fault:
            faults.append(fault)
    if head := manifest.get("head"):
        try:
            checked(path / head["file"])
        except DamagedError as error:
            faults.append(str(error))
    listed = {*manifest["shards"]}
    for file in sorted((path / "shards").iterdir()):
        if file.name not in listed:
            faults.append(f"{file} is not listed in the manifest, and not read")
    return faults


def drop_damaged(path: str | Path) -> list[str]:
    """Takes damaged shards off a store's list and sets them aside as NAME.damaged, so that the
    rest can be read and `sadkern cache` makes them again; their names are returned."""
    path = Path(path)
    dropped = [name for name in read_manifest(path)["shards"] if _fault(path / "shards" / name)]
    with changed_manifest(path) as manifest:
        for name in dropped:
            del manifest["shards"][name]
    for name in dropped:
        if (path / "shards" / name).exists():
            (path / "shards" / name).rename(path / f"{name}.damaged")
    return dropped


def merge(
    sources: Sequence[str | Path],
    output: str | Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = iter,
) -> Store:
    """All trajectories of `sources` in one store, each once. IdentityError: of different signals.

    Of a trajectory that several have, the record with more rows is kept.
    """
    stores = [Store.open(source) for source in sources]
    merged = Store.create(output, stores[0].identity)
    for store in stores[1:]:
        merged.require(store.identity)
    heads = [store for store in stores if store.manifest.get("head")]
    if heads and not merged.manifest.get("head"):
        facts = heads[0].manifest["head"]
        merged.keep_head(checked(heads[0].path / facts["file"]), facts)
    merged.adopt(merged.leftovers(MERGED), discard=True)  # of a merge that was interrupted
    best: dict[bytes, Store] = dict.fromkeys(merged, merged)
    for store in stores:
        for key in store:
            if key not in best or best[key].rows(key) < store.rows(key):
                best[key] = store
    group: list[tuple[bytes, Columns]] = []
    size = 0
    for key in progress([key for key, store in best.items() if store is not merged]):
        columns = best[key].read(key)
        group.append((key, columns))
        size += sum(column.nbytes for column in columns.values())
        if size >= shard_bytes:
            _write_group(merged, group)
            group, size = [], 0
    _write_group(merged, group)
    return merged


def _write_group(store: Store, group: list[tuple[bytes, Columns]]) -> None:
    if group:
        with store.writer(MERGED + digest([key.hex() for key, _ in group])) as writer:
            writer.add(group)
            writer.seal()


def _fault(file: Path) -> str | None:
    try:
        Shard(file).verify()
    except DamagedError as error:
        return str(error)
    return None
