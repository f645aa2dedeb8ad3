"""Files as they are written here: whole or not at all, and held by one process at a time."""

from __future__ import annotations

import fcntl
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any, BinaryIO

HALF = ".part"


class BusyError(RuntimeError):
    """Another process is writing there."""


def write_whole(path: Path, data: bytes) -> None:
    """The file has these bytes or, after a kill or a crash, those it had before. Of several that
    write it at once, each writes all of it, and the last counts."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{HALF}")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def clear_halves(folder: Path) -> None:
    """Removes what a `write_whole` that was killed has left; nobody may be writing there."""
    for half in folder.glob(f".*{HALF}"):
        half.unlink()


def write_json(path: Path, content: Any) -> None:
    """Whole, in a folder that is made, and as any reader of JSON takes it: what is no number is
    null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(plain(content), indent=1) + "\n").encode())


def hold(path: Path) -> BinaryIO:
    """The file, made where there is none, to append to; until it is closed no other process holds
    it. BusyError: one does."""
    file = open(path, "ab")  # noqa: SIM115 (held until it is closed)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BusyError(
            f"{path} is being written by another process: expected to wait for it, or another place"
        ) from None
    return file
