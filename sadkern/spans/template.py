"""Chats written out by a tokenizer's own chat template, and where in it the model's turns are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from sadkern.spans.record import MODEL, Region, Rendered, Turn, turns_of, unknown_roles

GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
OPENED = re.compile(r"<(?:think|thinking|thought|reasoning)>\s*\Z")
# Characters that no text has, in the place of a turn's thought and of its content.
THOUGHT, CONTENT = "\ue001", "\ue000"
HOLE = re.compile(f"{THOUGHT}[^{CONTENT}]*{CONTENT}|{CONTENT}")


def templated(tokenizer: Any) -> Any:
    """The tokenizer, if it has a chat template; else None, so that chats are written plainly."""
    return None if getattr(tokenizer, "chat_template", None) is None else tokenizer


def render_by(tokenizer: Any, record: Any) -> Rendered:
    """A chat as the template writes it.

    Where the template says itself what the assistant's tokens are, that is taken. Else each turn is
    found by writing the chat once more with a hole in its place: what is the same before and after
    is not the turn's. A template that leaves out what a model thought in earlier turns is told of.
    """
    if templated(tokenizer) is None:
        raise ValueError(
            f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template: expected "
            "one that has, or segment without a tokenizer, which writes chats plainly"
        )
    turns = list(turns_of(record))
    tools = record.get("tools") if isinstance(record, Mapping) else None
    messages = [turn.message for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        template = tokenizer.chat_template
        marks_turns = isinstance(template, str) and GENERATION.search(template)
        found = (_marked if marks_turns else _differing)(tokenizer, turns, text, tools)
    except Exception as error:  # of jinja2's, or what a template does with a message's parts
        raise ValueError(f"the tokenizer's chat template refuses this chat: {error}") from error
    thoughts = {i: messages[i].get("reasoning_content", "").strip() for i in found}
    dropped = any(thoughts[i] not in text[start:end] for i, (start, end) in found.items())
    warnings = unknown_roles(message["role"] for message in messages)
    warnings += ["the chat template leaves out what was thought in some turns"] * dropped
    special = [str(x) for x in tokenizer.added_tokens_decoder.values() if x.special]
    regions = [_region(text, start, end, special) for start, end in found.values() if start < end]
    return Rendered(text, regions, turns=True, complete=True, warnings=warnings)


Places = dict[int, tuple[int, int]]  # message -> its characters


def _marked(tokenizer: Any, turns: list[Turn], text: str, tools: Any) -> Places:
    """By the template's own {% generation %} blocks."""
    made = tokenizer.apply_chat_template(
        [turn.message for turn in turns],
        tools=tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    runs = []
    pairs = zip(made["assistant_masks"], made["offset_mapping"], strict=True)
    for own, run in groupby(pairs, key=lambda pair: pair[0]):
        offsets = [offset for _, offset in run]
        if own:
            runs.append((offsets[0][0], offsets[-1][1]))
    model = [i for i, turn in enumerate(turns) if turn.message["role"] == MODEL]
    if len(runs) != len(model):
        raise ValueError(f"it marks {len(runs)} turns as the assistant's, of {len(model)}")
    return {i: place for i, place in zip(model, runs, strict=True) if turns[i].learnt}


def _differing(tokenizer: Any, turns: list[Turn], text: str, tools: Any) -> Places:
    """By what changes when a turn does: of all turns at once or, where that leaves doubt, of one
    after the other."""
    learnt = [i for i, turn in enumerate(turns) if turn.learnt]

    def with_holes(places: list[int]) -> str:
        messages = [turn.message for turn in turns]
        for i in places:
            thought = {"reasoning_content": THOUGHT} if "reasoning_content" in messages[i] else {}
            messages[i] = {"role": MODEL, "content": CONTENT, **thought}
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)

    spaces = _between(text, HOLE.split(with_holes(learnt))) or []
    pairs = zip(learnt, spaces, strict=False)
    if len(spaces) != len(learnt) or any(
        turns[i].message["content"].strip() not in text[start:end] for i, (start, end) in pairs
    ):
        spaces = [_changed(text, with_holes([i])) for i in learnt]
    return {i: _opened(text, *space) for i, space in zip(learnt, spaces, strict=True)}


def _between(text: str, fixed: list[str]) -> list[tuple[int, int]] | None:
    """What stands in `text` between the parts that do not change; None if they are not there."""
    spaces = []
    reached = len(fixed[0])
    if not text.startswith(fixed[0]) or not all(map(str.strip, fixed[1:-1])):
        return None
    for part in fixed[1:-1]:
        end = text.find(part, reached)
        if end < 0:
            return None
        spaces.append((reached, end))
        reached = end + len(part)
    end = len(text) - len(fixed[-1])
    if len(fixed) == 1 or end < reached or not text.endswith(fixed[-1]):
        return None
    return [*spaces, (reached, end)]


def _changed(text: str, other: str) -> tuple[int, int]:
    """The part of `text` in which `other` has a hole."""
    # (An empty turn has no place of its own: its hole's is where its end is.)
    hole = HOLE.search(other)
    start = min(_common(text, other), hole.start() if hole else len(text))
    return start, len(text) - _common(text[start:][::-1], other[start:][::-1])


def _opened(text: str, start: int, end: int) -> tuple[int, int]:
    """With the tag that a template opens whatever was thought: that is the turn's too."""
    opened = OPENED.search(text, max(0, start - 32), start)
    return (opened.start() if opened else start), end


def _common(a: str, b: str) -> int:
    """How long the beginning is that two texts share, by halving."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _region(text: str, start: int, end: int, special: list[str]) -> Region:
    """With the special token that ends a turn as its stop, whether the turn has it or the rest."""
    own = text[start:end].rstrip()
    inside = max((len(x) for x in special if x and own.endswith(x)), default=0)
    if inside:
        return Region(start, start + len(own) - inside, start + len(own))
    rest = text[end:].lstrip()
    behind = max((len(x) for x in special if x and rest.startswith(x)), default=0)
    return Region(start, end, len(text) - len(rest) + behind if behind else end)
