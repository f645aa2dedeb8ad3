"""What DistillKit captures: a sequence a row, each position's tokens and values in a few bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import yaml

from sadkern.teacher.imports.packing import Bytes, Config, Words, made
from sadkern.teacher.imports.table import Row, Rows, matrix, vector

CONFIG = "compression_config.yaml"


class DistillKit:
    """Reads `compressed_logprobs` and `bytepacked_indices`; `packed_indices`, `exact_values` and
    `coeffs` of the format before; or `token_ids` and `top_values`, which need no config.

    Row p is the distribution of token p + 1. config: what `load_config` gives. ValueError: it does
    not hold together.
    """

    columns = (
        *("input_ids", "attention_mask", "compressed_logprobs", "bytepacked_indices"),
        *("packed_indices", "exact_values", "coeffs", "token_ids", "top_values"),
    )

    def __init__(self, config: Config | None = None):
        self.packing: Bytes | Words | None = None
        if config is not None:
            self.packing = made(Words if "vocab_size" in config else Bytes, config)
        self.k = self.packing and self.packing.k
        self.vocab = self.packing and self.packing.vocab

    def read(self, row: Row) -> Rows:
        """See `Format.read`."""
        if row.get("top_values") is not None:
            ids = matrix(row, "token_ids", np.int64, -1)
            logprobs = matrix(row, "top_values", np.float64, -np.inf)
        elif self.packing is None:
            raise ValueError(
                f"how the values are packed is not known: expected {CONFIG} beside the file, or "
                "--config"
            )
        else:
            ids, logprobs = self.packing.unpack(row)
        length = len(vector(row, "input_ids"))
        if ids.shape != logprobs.shape or not length - 1 <= len(ids) <= length:
            raise ValueError(
                f"ids are {list(ids.shape)} and values {list(logprobs.shape)}: expected the same, "
                f"and {length - 1} or {length} positions for {length} input_ids"
            )
        return Rows(np.arange(len(ids)), ids, logprobs)


def load_config(path: str | Path) -> Config:
    """How values are packed, from the file beside them or from a YAML of DistillKit's training.
    ValueError: it says nothing of that."""
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if isinstance(found, Mapping) and isinstance(found.get("teacher"), Mapping):
        teacher = found["teacher"]
        found = teacher.get("logprob_compressor") or teacher.get("legacy_logit_compression")
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{path} does not say how values are packed: expected a {CONFIG}, or "
            "teacher.logprob_compressor in it"
        )
    return found


def find_config(files: Iterable[str | Path]) -> Config | None:
    """What lies beside the files, if anything. ValueError: they are packed in different ways."""
    beside = sorted({Path(file).parent / CONFIG for file in files})
    found = [(path, load_config(path)) for path in beside if path.exists()]
    for path, config in found:
        if config != found[0][1]:
            raise ValueError(
                f"{path} differs from {found[0][0]}: expected files that are packed alike, one "
                "import after another"
            )
    return found[0][1] if found else None
