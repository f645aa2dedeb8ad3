"""`sadkern cache`: a teacher's signal for files of trajectories, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from sadkern.data import load_trajectories, prepare
from sadkern.store import Store
from sadkern.store.care import drop_damaged, merge, verify
from sadkern.store.directory import read_manifest
from sadkern.teacher.build import build
from sadkern.teacher.cached import store_for
from sadkern.teacher.imports import Axolotl, DistillKit, find_config, import_files, load_config
from sadkern.teacher.load import load_teacher
from sadkern.teacher.named import device_named, dtype_named, model_named
from sadkern.teacher.served import ServedTeacher


def write(
    output: Path,
    data: Sequence[Path],
    *,
    model: str | None,
    server: str | None,
    tokenizer: str | None,
    mode: str,
    k: int,
    temperature: float,
    batch_size: int,
    shard_mib: float,
    reading: dict[str, Any],
    loading: dict[str, Any],
    serving: dict[str, Any],
) -> None:
    """Adds to the store at `output` what it lacks of the trajectories in the files `data`.

    `reading`: of `prepare`; `loading`: of `load_teacher`; `serving`: of `ServedTeacher`.
    """
    if not (model or server):
        raise ValueError("no teacher: expected --model (a folder or a hub's name) or --server")
    if server and not (tokenizer or model):
        raise ValueError("--server needs the model's tokenizer: expected --tokenizer")
    rank, ranks, device = _place(loading.pop("device"))
    dtype_named(loading["dtype"])
    texts = AutoTokenizer.from_pretrained(model_named(tokenizer or model or ""))
    # Before the model, which takes longer to load and has less to be wrong.
    records = [record for path in data for record in load_trajectories(path)]
    examples = prepare(records, texts, **reading)
    if server:
        teacher: Any = ServedTeacher(server, model=model, tokenizer=texts, k=k, **serving)
        device = torch.device("cpu")
    else:
        assert model is not None
        teacher = load_teacher(model, device=device, sample=examples, **loading)
    teacher.expect(examples, tokenizer=texts, temperature=temperature)
    store = store_for(output, teacher, texts, mode=mode, k=k, temperature=temperature)
    added = build(
        store, examples, teacher, batch_size=batch_size, shard_bytes=int(shard_mib * 2**20),
        device=device, share=(rank, ranks),
    )  # fmt: skip
    print(f"{output}: {added} trajectories added, {len(store)} in all")


def info(path: Path, as_json: bool) -> None:
    """Prints what a store holds."""
    store = Store.open(path, parts=True)
    shards = store.manifest["shards"].values()
    rows = sum(map(store.rows, store))
    size = sum(shard["bytes"] for shard in shards)
    sealed = sum(shard["rows"] for shard in shards)
    facts: dict[str, Any] = {
        **{name: value for name, value in vars(store.identity).items() if value is not None},
        "trajectories": len(store),
        "supervised tokens": rows,
        "shards": len(store.manifest["shards"]),
        "not sealed": len(store.leftovers()),
        "bytes": size,
        "bytes per supervised token": round(size / sealed, 2) if sealed else None,
    }
    if as_json:
        Console(soft_wrap=True).print_json(data=facts)
        return
    table = Table(show_header=False, title=str(path), title_justify="left")
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int | float) else str(value))
    Console().print(table)


def check(path: Path, drop: bool) -> int:
    """Prints what is wrong with a store; 1 where something is."""
    faults = verify(path, lambda names: tqdm(names, desc="verifying", unit="shard", leave=False))
    for fault in faults:
        print(fault)
    if not faults:
        shards = read_manifest(path)["shards"]
        print(f"{path}: {len(shards)} shards, every byte as it was written")
    elif drop:
        for name in drop_damaged(path):
            print(f"dropped {name}: the `sadkern cache` command that made it makes it again")
    return int(bool(faults))


def join(sources: Sequence[Path], output: Path, shard_mib: float) -> None:
    """Makes one store of several."""
    store = merge(
        sources, output, int(shard_mib * 2**20),
        lambda keys: tqdm(keys, desc="merging", unit="trajectory", leave=False),
    )  # fmt: skip
    print(f"{output}: {len(store)} trajectories of {len(sources)} stores")


def bring(
    files: Sequence[Path],
    output: Path,
    *,
    format: str,
    teacher: str,
    revision: str | None,
    tokenizer: str | None,
    vocab: int | None,
    temperature: float,
    config: Path | None,
    align: str,
    shard_mib: float,
) -> None:
    """Adds to the store at `output` what it lacks of another tool's captures in `files`."""
    if format == "distillkit":
        if align != "next":
            raise ValueError(f"--align {align}: DistillKit's rows are of the next token, always")
        source: Any = DistillKit(load_config(config) if config else find_config(files))
    elif format == "axolotl":
        if config:
            raise ValueError("--config is of DistillKit's captures, and axolotl's have none")
        source = Axolotl(align)
    else:
        raise ValueError(f"--format {format}: expected distillkit or axolotl")
    done = import_files(
        output, files, source, teacher=teacher, revision=revision, temperature=temperature,
        tokenizer=AutoTokenizer.from_pretrained(tokenizer) if tokenizer else None, vocab=vocab,
        shard_bytes=int(shard_mib * 2**20),
    )  # fmt: skip
    print(
        f"{output}: {done.added} trajectories added, {done.there} were there, {done.left_out} rows "
        f"left out, {len(done.store)} in all"
    )


def _place(device: str) -> tuple[int, int, torch.device]:
    """Rank, ranks and device of this process, as torchrun says."""
    rank, ranks, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    return rank, ranks, device_named(device)
