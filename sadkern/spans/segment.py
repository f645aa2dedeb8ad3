"""From a transcript to its spans, as character ranges of the rendered text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sadkern.spans.profiles import PROFILES, Marker, Profile


class Span(NamedTuple):
    """The characters `text[start:end]` and what they are: REASON or ACT."""

    start: int
    end: int
    kind: int


@dataclass(frozen=True)
class Segmentation:
    """A transcript and where its spans are.

    `text`: as it is to be tokenised. `spans`: ordered, disjoint, none of them empty. `profile`: the
    name of the one they were found with, None if none matched. `warnings`: to be shown.
    """

    text: str
    spans: list[Span]
    profile: str | None
    warnings: list[str] = field(default_factory=list)


def segment(record: str | Mapping[str, Any], profile: str | Profile = "auto") -> Segmentation:
    r"""Find the spans of a transcript.

    `record`: the transcript, or a mapping with "text" and, optionally, "prompt". A prompt is put
    before the text, with a newline between them unless one is there already, and is unsupervised
    whatever it holds (few-shot examples have markers too).

    `profile`: a name, a `Profile`, or "auto": the one whose markers match the most supervised lines
    of the text, of equals the first in "paper", "react".

    A span is a marker's content: neither the marker nor the white space around the content belongs
    to it. Reasoning runs to the next marker, an action to the end of its line. If nothing is found,
    `spans` is empty and a warning says so. ValueError: an unknown profile, or a record of another
    shape. Linear in the length of the text.

    Source: Structured Agent Distillation, appendix D.1.

    >>> found = segment("Thought 1: Who wrote it?\nAction 1: Search[Emma]\nObservation 1: A novel.")
    >>> found.profile, found.spans
    ('react', [Span(start=11, end=24, kind=1), Span(start=35, end=47, kind=2)])
    >>> [found.text[start:end] for start, end, kind in found.spans]
    ['Who wrote it?', 'Search[Emma]']
    >>> segment("Nothing of the kind.").warnings
    ['no span found: no line begins with a supervised marker of the profiles paper, react']
    """
    text, begin = _render(record)
    candidates = _candidates(profile)
    scans = [(candidate, list(candidate.scan(text, begin))) for candidate in candidates]
    best, hits = max(scans, key=lambda scan: sum(hit[0].kind != 0 for hit in scan[1]))
    matched = any(marker.kind for marker, _, _ in hits)
    spans = _spans(text, hits)
    if spans:
        return Segmentation(text, spans, best.name)
    why = (
        f"every supervised marker of the profile {best.name} is without content"
        if matched
        else "no line begins with a supervised marker of "
        + ("the profiles " if len(candidates) > 1 else "the profile ")
        + ", ".join(candidate.name for candidate in candidates)
    )
    named = best.name if matched or len(candidates) == 1 else None
    return Segmentation(text, [], named, [f"no span found: {why}"])


def _candidates(profile: str | Profile) -> list[Profile]:
    if isinstance(profile, Profile):
        return [profile]
    if profile == "auto":
        return list(PROFILES.values())
    if isinstance(profile, str) and profile in PROFILES:
        return [PROFILES[profile]]
    raise ValueError(f"profile {profile!r}: expected auto, {', '.join(PROFILES)} or a Profile")


def _render(record: str | Mapping[str, Any]) -> tuple[str, int]:
    """The text as a whole, and the character at which its supervised part begins."""
    if isinstance(record, str):
        return record, 0
    if not isinstance(record, Mapping):
        raise ValueError(
            f'record is {type(record).__name__}: expected a string or a mapping with "text"'
        )
    if not isinstance(record.get("text"), str):
        got = f'"text" of {type(record["text"]).__name__}' if "text" in record else list(record)
        raise ValueError(f'record has {got}: expected a string under "text"')
    text, prompt = record["text"], record.get("prompt")
    if prompt is None or prompt == "":
        return text, 0
    if not isinstance(prompt, str):
        raise ValueError(f'record has "prompt" of {type(prompt).__name__}: expected a string')
    # A marker counts only at the start of a line, so the text must begin one.
    if not prompt.endswith("\n"):
        prompt += "" if text.startswith(("\n", "\r\n")) else "\n"
    return prompt + text, len(prompt)


def _spans(text: str, hits: list[tuple[Marker, int, int]]) -> list[Span]:
    starts = [*(line_start for _, line_start, _ in hits), len(text)]
    spans = []
    for (marker, _, begin), next_marker in zip(hits, starts[1:], strict=True):
        if not marker.kind:
            continue
        newline = -1 if marker.multiline else text.find("\n", begin, next_marker)
        stop = next_marker if newline < 0 else newline
        content = text[begin:stop]
        start, end = stop - len(content.lstrip()), begin + len(content.rstrip())
        if start < end:
            spans.append(Span(start, end, marker.kind))
    return spans
