"""From a record, in any shape that data sets have, to one text, and what of it a model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TURNS = ("messages", "conversations")
TEXTS = ("text", "completion", "response")
MODEL, TOOL = "assistant", "tool"
# As data sets call them -> as chat templates do.
ROLES = {
    **dict.fromkeys(("assistant", "gpt", "agent", "ai", "model", "bot", "function_call"), MODEL),
    **dict.fromkeys(("user", "human", "environment", "env"), "user"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), TOOL),
}
REASONING = ("reasoning_content", "reasoning", "thinking")

# A text whose turns are marked as chat templates mark them: begin of a model's turn, and its end.
WRITTEN_TURNS = (
    ("<|im_start|>assistant\n", "<|im_end|>"),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<start_of_turn>model\n", "<end_of_turn>"),
)


class Region(NamedTuple):
    """A part of the text in which spans may be: `text[start:end]`; `stop`, one past what ends it.

    Of a transcript in one piece, which is not all the model's, `stop` is one past the end of the
    text: the EOS that a tokenizer puts there.
    """

    start: int
    end: int
    stop: int


@dataclass(frozen=True)
class Rendered:
    """`turns`: whether the regions are a model's turns, or one transcript. `complete`: whether the
    text has its special tokens written out, so that none is to be added."""

    text: str
    regions: list[Region]
    turns: bool
    complete: bool = False
    warnings: list[str] = field(default_factory=list)


class Turn(NamedTuple):
    """A message as chat templates take it, and whether the model is to learn it."""

    message: dict[str, Any]
    learnt: bool


def render(record: Any) -> Rendered:
    """A string; a mapping with a "text" and perhaps a "prompt"; or a chat, as `turns_of` takes it,
    which is written plainly: a line for the role, the content, a newline. ValueError: another."""
    if isinstance(record, str):
        return _transcript(record, 0)
    if has_turns(record):
        return _plainly(turns_of(record))
    text, prompt = _text_of(record), record.get("prompt")
    if prompt is None or prompt == "":
        return _transcript(text, 0)
    if not isinstance(prompt, str):
        raise ValueError(f'record has "prompt" of {type(prompt).__name__}: expected a string')
    # A marker counts only at the start of a line, so the text must begin one.
    if not prompt.endswith("\n"):
        prompt += "" if text.startswith(("\n", "\r\n")) else "\n"
    return _transcript(prompt + text, len(prompt))


def has_turns(record: Any) -> bool:
    """Whether a record is a chat."""
    if isinstance(record, Mapping):
        return any(_is_list(record.get(key)) for key in TURNS)
    return _is_list(record)


def _is_list(value: Any) -> bool:
    """One that is not empty."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0


def _text_of(record: Any) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(
            f"record is {type(record).__name__}: expected a string, a list of messages, or a "
            f'mapping with "text", "messages" or "conversations"'
        )
    for key in TEXTS:
        if isinstance(record.get(key), str):
            return record[key]
    named = [key for key in (*TEXTS, *TURNS) if key in record]
    got = f'"{named[0]}" {record[named[0]]!r:.40}' if named else list(record)
    raise ValueError(
        f'record has {got}: expected a string under "text", or a list of messages under '
        '"messages" or "conversations"'
    )


def _transcript(text: str, begin: int) -> Rendered:
    """A text in one piece, unless its turns are marked in it."""
    for opening, closing in WRITTEN_TURNS:
        if opening in text[begin:]:
            found = re.finditer(f"{re.escape(opening)}(.*?)({re.escape(closing)}|\\Z)", text, re.S)
            regions = [Region(*match.span(1), match.end()) for match in found]
            return Rendered(text, [x for x in regions if x.start >= begin], turns=True)
    return Rendered(text, [Region(begin, len(text), len(text) + 1)], turns=False)


def unknown_roles(roles: Iterable[str]) -> list[str]:
    """A warning, where there are any."""
    unknown = set(roles) - set(ROLES.values())
    said = f"roles that are not known and not learnt: {', '.join(sorted(unknown))}"
    return [said] if unknown else []


def turns_of(record: Any) -> Iterator[Turn]:
    """The messages of a chat, with the keys `role`, `content`, `reasoning_content`, `tool_calls`.

    A message: `role` or `from`; `content` or `value`, a string, a list of parts, or none;
    `reasoning_content`; `tool_calls` or `function_call`, whose arguments may be JSON in a string.
    What has `loss` false or `weight` 0 is not learnt. ValueError: something else, naming it.
    """
    if isinstance(record, Mapping):
        record = next(record[key] for key in TURNS if _is_list(record.get(key)))
    for i, message in enumerate(record):
        yield _turn(message, f"messages[{i}]")


def _turn(message: Any, place: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} is {type(message).__name__}: expected a mapping")
    said = next((message[key] for key in ("role", "from") if message.get(key)), None)
    if said is None:
        raise ValueError(f"{place} has no role: expected one of {', '.join(ROLES)}")
    role = ROLES.get(str(said).lower(), str(said))  # of an unknown one nothing is learnt
    content, reasoning, calls = _parts(
        next((message[key] for key in ("content", "value") if message.get(key) is not None), ""),
        place,
    )
    for key in REASONING:
        if isinstance(message.get(key), str):
            reasoning = message[key]
    if said == "function_call":
        content, calls = "", [*calls, {"function": _parsed_call(content)}]
    if role == MODEL and "</think>" in content and "<think>" not in content:
        # Its beginning was the prompt's.
        reasoning, _, content = content.partition("</think>")
    calls += message.get("tool_calls") or []
    if isinstance(message.get("function_call"), Mapping):
        calls.append({"function": message["function_call"]})
    made: dict[str, Any] = {"role": role, "content": content}
    if reasoning.strip():
        made["reasoning_content"] = reasoning.strip("\n")
    if calls:
        made["tool_calls"] = [_call(call, place) for call in calls]
    for key in ("name", "tool_call_id"):
        if message.get(key):
            made[key] = message[key]
    learnt = message.get("loss") is not False and message.get("weight") != 0
    return Turn(made, role == MODEL and learnt)


def _parts(content: Any, place: str) -> tuple[str, str, list[Any]]:
    """Text, reasoning and calls of a content, which may be a list of typed parts."""
    if isinstance(content, str):
        return content, "", []
    if not isinstance(content, Sequence) or not all(isinstance(x, Mapping) for x in content):
        raise ValueError(
            f"{place} has content of {type(content).__name__}: expected a string or a list of parts"
        )
    texts, reasoning, calls = [], [], []
    for part in content:
        kind = part.get("type", "text")
        if kind == "thinking":
            reasoning.append(str(part.get("thinking", "")))
        elif kind == "tool_use":
            calls.append({"function": {"name": part.get("name"), "arguments": part.get("input")}})
        elif kind == "tool_result":
            texts.append(_parts(part.get("content") or "", place)[0])
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
    return "\n".join(texts), "\n".join(reasoning), calls


def _parsed_call(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"name": text, "arguments": {}}


def _call(call: Any, place: str) -> dict[str, Any]:
    """With its arguments as they are in JSON, so that templates write them as such."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place} has tool call {call!r}: expected a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):  # else as the model wrote it
            arguments = json.loads(arguments)
    function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {"type": "function", "function": function}


def written(turn: Turn) -> str:
    """What a model wrote in a turn, with tags around thoughts and calls as Qwen and Hermes do."""
    message = turn.message
    pieces = []
    if message.get("reasoning_content"):
        pieces.append(f"<think>\n{message['reasoning_content']}\n</think>\n")
    if message["content"].strip():
        pieces.append(message["content"])
    for call in message.get("tool_calls", ()):
        said = json.dumps(call["function"], ensure_ascii=False)
        pieces.append(f"<tool_call>\n{said}\n</tool_call>")
    return "\n".join(pieces)


def _plainly(turns: Iterator[Turn]) -> Rendered:
    """As no model's own template, but so that any tokenizer has a token for a turn's end."""
    text, regions, length = [], [], 0
    roles = set()
    for turn in turns:
        roles.add(turn.message["role"])
        opening, own = f"<|{turn.message['role']}|>\n", written(turn)
        text += [opening, own, "\n"]
        start = length + len(opening)
        length = start + len(own) + 1
        if turn.learnt:
            regions.append(Region(start, length - 1, length))
    return Rendered("".join(text), regions, turns=True, warnings=unknown_roles(roles))
