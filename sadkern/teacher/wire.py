"""What servers are asked for the log-probabilities of a prompt's tokens, and how they answer.

A server's entry i speaks of token i given those before it: it is row i - 1. Entry 0 has nothing
before it, and is null. Temperature 1 is sent: vLLM and SGLang apply none to a prompt's
log-probabilities, and of older versions that did it is the one that changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entries = dict[int, float]  # log-probabilities by token id
BANNED = -9999.0  # vLLM's -inf, which JSON has no word for


class WireError(ValueError):
    """An answer is not what the server's format says; the message says where."""


@dataclass(frozen=True)
class Wire:
    """How one kind of server is spoken to."""

    path: str
    models: str
    """where it says what it serves"""
    ask: Callable[[Sequence[Sequence[int]], int, str], dict[str, Any]]
    """prompts (token ids), k, model's name -> the request's JSON"""
    read: Callable[[Any, Sequence[Sequence[int]], Callable[[str], int | None]], list[list[Entries]]]
    """the answer's JSON, prompts, ids of tokens by their text -> entries 1 to P - 1 of each prompt,
    the actual token among them"""


def _ask_vllm(prompts: Sequence[Sequence[int]], k: int, model: str) -> dict[str, Any]:
    return {
        "model": model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": 1,
        "temperature": 1.0, "prompt_logprobs": k, "return_token_ids": True,
        "add_special_tokens": False,
    }  # fmt: skip


def _read_vllm(answer: Any, prompts: Sequence[Sequence[int]], _: Any) -> list[list[Entries]]:
    found = []
    for prompt, choice in zip(prompts, _choices(answer, prompts), strict=True):
        ids = choice.get("prompt_token_ids")
        if ids is not None and list(ids) != list(prompt):
            raise WireError(f"it read other tokens, {len(ids)}, than the {len(prompt)} sent")
        entries = _entries(choice.get("prompt_logprobs"), "prompt_logprobs", len(prompt))
        rows = []
        for at, entry in enumerate(entries, 1):
            row = _row({int(key): one["logprob"] for key, one in entry.items()}, at)
            if prompt[at] not in row:
                raise WireError(f"its entries of token {at} lack that token itself, {prompt[at]}")
            rows.append(row)
        found.append(rows)
    return found


def _ask_sglang(prompts: Sequence[Sequence[int]], k: int, model: str) -> dict[str, Any]:
    return {
        "input_ids": [list(prompt) for prompt in prompts], "return_logprob": True,
        "logprob_start_len": 0, "top_logprobs_num": k, "return_text_in_logprobs": False,
        "stream": False, "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
    }  # fmt: skip


def _read_sglang(answer: Any, prompts: Sequence[Sequence[int]], _: Any) -> list[list[Entries]]:
    if not isinstance(answer, list) or len(answer) != len(prompts):
        raise WireError(f"it answered {_of(answer)}, expected a list of {len(prompts)} answers")
    found = []
    for prompt, one in zip(prompts, answer, strict=True):
        meta = one["meta_info"]
        if meta.get("prompt_tokens", len(prompt)) != len(prompt):
            raise WireError(f"it read {meta['prompt_tokens']} tokens of the {len(prompt)} sent")
        actual = _entries(meta.get("input_token_logprobs"), "input_token_logprobs", len(prompt))
        likely = _entries(meta.get("input_top_logprobs"), "input_top_logprobs", len(prompt))
        rows = []
        for at, (top, (logprob, *_rest)) in enumerate(zip(likely, actual, strict=True), 1):
            # The id of the actual token is our own: SGLang clips that of the last one to 0.
            rows.append(_row({**{i: x for x, i, *_ in top}, prompt[at]: logprob}, at))
        found.append(rows)
    return found


def _ask_openai(prompts: Sequence[Sequence[int]], k: int, model: str) -> dict[str, Any]:
    return {
        "model": model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": 1,
        "temperature": 1.0, "echo": True, "logprobs": k, "return_tokens_as_token_ids": True,
    }  # fmt: skip


def _read_openai(
    answer: Any, prompts: Sequence[Sequence[int]], id_of: Callable[[str], int | None]
) -> list[list[Entries]]:
    found = []
    for prompt, choice in zip(prompts, _choices(answer, prompts), strict=True):
        logprobs = choice.get("logprobs") or {}
        count = len(prompt)
        # The token that was made after the prompt, as one had to be, is cut off.
        given = [(logprobs.get(name) or [])[:count] for name in ("token_logprobs", "top_logprobs")]
        actual, likely = (
            _entries(x, name, count)
            for x, name in zip(given, ("token_logprobs", "top_logprobs"), strict=True)
        )
        rows = []
        for at, (top, logprob) in enumerate(zip(likely, actual, strict=True), 1):
            # A text that several tokens have cannot be told apart: it is left to the tail.
            known = {i: x for text, x in top.items() if (i := id_of(text)) is not None}
            rows.append(_row({**known, prompt[at]: logprob}, at))
        found.append(rows)
    return found


WIRES = {
    "vllm": Wire("/v1/completions", "/v1/models", _ask_vllm, _read_vllm),
    "sglang": Wire("/generate", "/v1/models", _ask_sglang, _read_sglang),
    "openai": Wire("/v1/completions", "/v1/models", _ask_openai, _read_openai),
}


def read(
    wire: Wire,
    answer: Any,
    prompts: Sequence[Sequence[int]],
    id_of: Callable[[str], int | None],
) -> list[list[Entries]]:
    """`wire.read`, where whatever is not of the format is a WireError."""
    try:
        return wire.read(answer, prompts, id_of)
    except WireError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise WireError(f"its answer is of another form: {type(error).__name__} {error}") from error


def message_of(body: Any) -> str:
    """What a server says is wrong, wherever in its answer it says so."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    if isinstance(error, Mapping):
        error = error.get("message", error)
    return str(error)[:500]


def _choices(answer: Any, prompts: Sequence[Sequence[int]]) -> list[Mapping[str, Any]]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != len(prompts):
        raise WireError(f"it gave {_of(choices)} as choices, expected {len(prompts)}, one a prompt")
    sent, read = sum(map(len, prompts)), (answer.get("usage") or {}).get("prompt_tokens")
    if read is not None and read != sent:
        raise WireError(f"it read {read} tokens of the {sent} sent")
    places = [choice["index"] for choice in choices]
    if sorted(places) != list(range(len(prompts))):
        raise WireError(f"its choices are of prompts {places!r:.80}, expected each once")
    return [choices[places.index(i)] for i in range(len(prompts))]


def _entries(entries: Any, name: str, count: int) -> list[Any]:
    """All but the first, which is null."""
    if not isinstance(entries, list) or len(entries) != count:
        raise WireError(f"it gave {_of(entries)} as {name}, expected {count}, one a token")
    return entries[1:]


def _row(entries: Mapping[int, float | None], at: int) -> Entries:
    # A value that JSON has no word for comes as null or as a very low number.
    if not all(type(i) is int and i >= 0 for i in entries):
        raise WireError(f"its entries of token {at} are of {list(entries)!r:.80}, expected ids")
    found = {i: -math.inf if x is None or x <= BANNED else float(x) for i, x in entries.items()}
    mass = sum(map(math.exp, found.values()))
    if not mass <= 1.01:
        raise WireError(
            f"the probabilities of token {at} add up to {mass:.4g}, expected at most 1: is the "
            "server started with a logprobs mode that gives logits?"
        )
    return found


def _of(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, list) else f"{value!r:.80}"
