"""The columns from which axolotl distils: a row's likely tokens, ready for its trainer or raw."""

from __future__ import annotations

from typing import Any

import numpy as np

from sadkern.teacher.imports.table import Array, Row, Rows, matrix, vector

ALIGNMENTS = ("next", "same")
TOKEN = "token_id:"


class Axolotl:
    """Reads `target_logprobs`, `target_token_ids` and `target_mask` beside `input_ids`, or the raw
    `logprobs` of an answer, which are those of the last tokens.

    Trainer-ready log-probabilities have a mass of 1: what the K leave out was discarded there.

    align: "next", row p is the distribution of token p + 1, as axolotl expects now; "same", of
    token p, as it did before June 2025. Nothing in a file says which.
    """

    columns = (
        *("input_ids", "attention_mask", "target_logprobs", "target_token_ids", "target_mask"),
        "logprobs",
    )
    k = vocab = None  # of each row anew

    def __init__(self, align: str = "next"):
        if align not in ALIGNMENTS:
            raise ValueError(f"align={align!r}: expected one of {', '.join(ALIGNMENTS)}")
        self.shift = int(align == "same")

    def read(self, row: Row) -> Rows:
        """See `Format.read`."""
        length = len(vector(row, "input_ids"))
        if row.get("target_logprobs") is not None:
            ids, logprobs = _pair(row, "target_token_ids", "target_logprobs")
            if len(logprobs) != length:
                raise ValueError(
                    f"{len(logprobs)} target_logprobs and {length} input_ids: expected as many"
                )
            if row.get("target_mask") is not None:
                masked = matrix(row, "target_mask", np.int64, 0) == 0
                if masked.shape != ids.shape:
                    raise ValueError(
                        f"target_mask is {list(masked.shape)}: expected {list(ids.shape)}, as "
                        "target_token_ids"
                    )
                ids[masked] = -1
        else:
            ids, logprobs = _raw(row)
            if len(logprobs) > length:
                raise ValueError(
                    f"{len(logprobs)} logprobs and {length} input_ids: expected at most as many"
                )
        begin = length - len(logprobs) - self.shift
        return Rows(begin + np.arange(len(logprobs)), ids, logprobs)


def _raw(row: Row) -> tuple[Array, Array]:
    entries: Any = row.get("logprobs")
    if entries is None:
        raise ValueError(
            f"expected target_logprobs, or logprobs beside input_ids: got columns {', '.join(row)}"
        )
    if not _is_named(entries):
        return _pair(row, "target_token_ids", "logprobs")
    try:
        apart = {
            "token": [[_token(entry["token"]) for entry in few] for few in entries],
            "logprob": [[entry["logprob"] for entry in few] for few in entries],
        }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"logprobs has an entry without a token and its logprob ({error!r})"
        ) from None
    return _pair(apart, "token", "logprob")


def _pair(row: Row, ids_name: str, logprobs_name: str) -> tuple[Array, Array]:
    logprobs = matrix(row, logprobs_name, np.float64, -np.inf)
    ids = matrix(row, ids_name, np.int64, -1).copy()
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"{ids_name} is {list(ids.shape)} and {logprobs_name} {list(logprobs.shape)}: expected "
            "the same"
        )
    return ids, logprobs


def _is_named(entries: Any) -> bool:
    """Each with its token beside it, as an OpenAI server answers."""
    return any(len(few) and isinstance(few[0], dict) for few in entries if isinstance(few, list))


def _token(token: str) -> int:
    number = str(token).removeprefix(TOKEN)
    if number == token or not number.isdecimal():
        raise ValueError(
            f"logprobs name tokens by text, which need not be one token: expected {TOKEN}N (vLLM "
            "writes it with --return-tokens-as-token-ids)"
        )
    return int(number)
