"""What a stored signal is the signal of: who gave it, in which tokens, at which temperature."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from sadkern.backends.kernels import MOST_TOKENS

MODES = ("topk", "sampled", "hidden")


class IdentityError(ValueError):
    """A store holds another signal than the one asked for; the message says what differs."""


@dataclass(frozen=True)
class Identity:
    """Of a whole store. None: not known, and then not compared."""

    mode: str
    """topk, sampled (both with ids and log-probabilities) or hidden (last hidden states)"""
    k: int | None
    """tokens of a row, or draws; None for hidden"""
    temperature: float | None
    """of the log-probabilities; None for hidden, which serves every temperature"""
    vocab: int
    """V, the teacher's"""
    teacher: str | None = None
    """its name"""
    revision: str | None = None
    """a hash of its weights, or what a server's owner calls them; where both sides have one, the
    name is not compared"""
    tokenizer: str | None = None
    """a hash of the tokens that the ids below `tokens` stand for"""
    tokens: int | None = None
    template: str | None = None
    """a hash of the chat template, "none" without one"""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: expected one of {', '.join(MODES)}")
        most = min(self.vocab, MOST_TOKENS)
        if self.mode == "topk" and self.k is not None and not 1 <= self.k <= most:
            raise ValueError(f"k={self.k}: expected 1 to {most} for a vocabulary of {self.vocab}")
        if self.mode == "sampled" and self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k}: expected at least one draw")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected a positive number")

    def differences(self, asked: Identity) -> list[str]:
        """In words, what `asked` has otherwise than this, the stored one."""
        mine, theirs = asdict(self), asdict(asked)
        if mine["revision"] and theirs["revision"]:
            mine["teacher"] = theirs["teacher"] = None
        return [
            f"{NAMES.get(name, name)} is {_shown(mine[name])} there and {_shown(theirs[name])} here"
            for name in mine
            if None not in (mine[name], theirs[name]) and mine[name] != theirs[name]
        ]


NAMES = {
    "vocab": "the vocabulary's size",
    "revision": "the teacher's revision (a hash of its weights)",
    "tokenizer": "the tokenizer (a hash of its vocabulary)",
    "tokens": "the number of the tokenizer's tokens",
    "template": "the chat template (a hash)",
}


def tokenizer_identity(tokenizer: Any, first: int | None = None) -> dict[str, Any]:
    """The fields of an `Identity` that a tokenizer decides: tokenizer, tokens and template.

    `first`: only ids below it count, so that a tokenizer to which tokens (padding, roles) were
    added later is still the same to what was stored before.
    """
    named = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    if first is not None:
        named = [pair for pair in named if pair[0] < first]
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": digest(named),
        "tokens": 1 + named[-1][0] if first is None else first,
        "template": "none" if template is None else digest(template),
    }


def digest(value: Any) -> str:
    """Of anything that JSON can say, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
