"""What a person names: a model, a device, a dtype. Each is looked at before anything is loaded,
which takes longer and says less."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

import torch


def model_named(name: str) -> str:
    """`name`, a folder or what a hub may have. ValueError: it can be neither."""
    path = Path(name)
    if path.is_dir():
        return name
    if path.is_file():
        raise ValueError(f"{name} is a file: expected a model's folder, such as {path.parent}")
    # A hub's are OWNER/NAME or NAME: of all else it need not be asked, which takes its time.
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        near = path.parent.iterdir() if path.parent.is_dir() else ()
        raise ValueError(
            f"there is no folder {name}: expected a model's folder, or a hub's name"
            + suggestion(path.name, (one.name for one in near if one.is_dir()))
        )
    return name


def device_named(name: str) -> torch.device:
    """ValueError: there is no such device, here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: expected cpu, cuda, cuda:1, ..") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def dtype_named(name: str) -> str:
    """`name`. ValueError: it is neither "auto" nor a dtype that weights can have."""
    dtype = getattr(torch, name, None)
    if name != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype {name!r}: expected auto, float32, bfloat16 or float16")
    return name


def suggestion(name: str, known: Iterable[str]) -> str:
    """What may have been meant, as the end of a sentence.

    >>> suggestion("learning_rat", ["seed", "learning_rate"])
    '. Did you mean learning_rate?'
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f". Did you mean {close[0]}?" if close else ""
