"""From a transcript to its spans, as character ranges of the rendered text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sadkern.spans.kinds import ACT, UNSUPERVISED
from sadkern.spans.profile import Piece, Profile, builtin, profile_named
from sadkern.spans.record import Region, Rendered, has_turns, render
from sadkern.spans.template import render_by

BLANK = re.compile(r"\s*")


class Span(NamedTuple):
    """The characters `text[start:end]` and what they are: REASON or ACT."""

    start: int
    end: int
    kind: int


@dataclass(frozen=True)
class Segmentation:
    """A transcript and where its spans are.

    `text`: as it is to be tokenised. `spans`: ordered, disjoint, none of them empty. `profile`: the
    name of the one they were found with, None if none matched. `warnings`: to be shown. `stops`: of
    each span, one past what ends it, the span's own end where nothing does; the end of the text
    counts as one character, the EOS. Without `stops` it is the line's end, or the text's.
    `complete`: the text has its special tokens written out, none is to be added.
    """

    text: str
    spans: list[Span]
    profile: str | None
    warnings: list[str] = field(default_factory=list)
    stops: list[int] | None = None
    complete: bool = False

    def span_stops(self) -> list[int]:
        """`stops`, or where they are by default."""
        if self.stops is not None:
            return self.stops
        whole = Region(0, len(self.text), len(self.text) + 1)
        return [_stop(self.text, span.end, span.end, whole, False) for span in self.spans]


def segment(
    record: Any,
    profile: str | Path | Profile = "auto",
    *,
    tokenizer: Any = None,
    supervise_markers: bool = False,
) -> Segmentation:
    r"""Find the spans of a transcript.

    A span is a marker's content: neither the marker nor the white space around the content belongs
    to it. If nothing is found, `spans` is empty and a warning says so. Linear in the text's length.

    Args:
        record: the transcript; a mapping with a "text" and perhaps a "prompt", which is put before
            it and is unsupervised whatever it holds (few-shot examples have markers too); or a
            chat: a list of messages, or a mapping with them under "messages" or "conversations".
            Of a chat only the model's own turns are looked at, and none with `loss: false`.
        profile: the name of one that comes along, a `Profile`, a .yaml file of one, or "auto": that
            whose markers begin the most spans, of equals the first in `sadkern.spans.PROFILES`.
        tokenizer: one whose chat template writes a chat out. Without it that is done plainly.
        supervise_markers: whether a marker belongs to the span that it begins.

    Raises:
        ValueError: an unknown profile, or a record of another shape.

    Source: Structured Agent Distillation, appendix D.1.

    >>> found = segment("Thought 1: Who wrote it?\nAction 1: Search[Emma]\nObservation 1: A novel.")
    >>> found.profile, found.spans
    ('react-hotpotqa', [Span(start=11, end=24, kind=1), Span(start=35, end=47, kind=2)])
    >>> [found.text[start:end] for start, end, kind in found.spans]
    ['Who wrote it?', 'Search[Emma]']
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> found = segment(chat)
    >>> found.profile, [found.text[start:end] for start, end, kind in found.spans]
    ('chat', ['Hello!'])
    """
    chosen = None if profile == "auto" else profile_named(profile)
    chat = tokenizer is not None and has_turns(record)
    rendered = render_by(tokenizer, record) if chat else render(record)
    text, warnings = rendered.text, list(rendered.warnings)
    chosen = chosen or _detected(rendered)
    spans: list[Span] = []
    stops: list[int] = []
    bare = False
    for region, part, piece in _supervised(rendered, chosen):
        if not part[piece.start : piece.end].strip():
            bare = True
            continue
        begin = piece.begin if supervise_markers and piece.marked else piece.start
        content = part[begin : piece.end]
        start = region.start + piece.end - len(content.lstrip())
        end = region.start + begin + len(content.rstrip())
        spans.append(Span(start, end, piece.kind))
        closed = piece.after > piece.end
        after = region.start + piece.after if closed else end
        stops.append(_stop(text, end, after, region, closed))
    if not spans:
        warnings.append(f"no span found: {_why(rendered, chosen, bare)}")
    name = chosen.name if chosen else None
    return Segmentation(text, spans, name, warnings, stops, rendered.complete)


def _why(rendered: Rendered, chosen: Profile | None, bare: bool) -> str:
    """There is no span."""
    if not any(rendered.text[region.start : region.end].strip() for region in rendered.regions):
        return "there is no text"
    if chosen is None:
        return "no line begins with a supervised marker of any profile"
    if bare:
        return f"every supervised marker of the profile {chosen.name} is without content"
    return f"no line begins with a supervised marker of the profile {chosen.name}"


def _detected(rendered: Rendered) -> Profile | None:
    """The profile that speaks for the most spans: a signature is worth one more."""
    best, most = None, 0
    parts = [rendered.text[region.start : region.end] for region in rendered.regions]
    for profile in builtin().values():
        if profile.reads == ("text" if rendered.turns else "turns"):
            continue
        if profile.signature is not None and not profile.signed(rendered.text):
            continue
        found = sum(
            piece.marked and piece.kind != UNSUPERVISED
            for part in parts
            for piece in profile.scan(part)
        )
        if found and found + (profile.signature is not None) > most:
            best, most = profile, found + (profile.signature is not None)
    # Turns without any marker are answers.
    return builtin()["chat"] if best is None and rendered.turns else best


def _supervised(rendered: Rendered, profile: Profile | None) -> Iterator[tuple[Region, str, Piece]]:
    """REASON and ACT pieces, each with its region and that one's text."""
    if profile is None:
        return
    for region in rendered.regions:
        part = rendered.text[region.start : region.end]
        for piece in _of_turn(part, profile) if rendered.turns else profile.scan(part):
            if piece.kind != UNSUPERVISED:
                yield region, part, piece


def _of_turn(part: str, profile: Profile) -> Iterator[Piece]:
    """The pieces of a model's turn, those without a marker being what the profile says."""
    if not any(profile.unmarked):
        yield from profile.scan(part)
        return
    # Scanned once more instead of kept: of a long turn the pieces are many.
    acts = (x.begin for x in profile.scan(part) if x.marked and x.kind == ACT)
    last_act = max(acts, default=-1)
    for piece in profile.scan(part):
        if piece.marked or not part[piece.start : piece.end].strip():
            yield piece
        else:
            before_act, otherwise = profile.unmarked
            yield piece._replace(kind=before_act if piece.begin < last_act else otherwise)


def _stop(text: str, end: int, after: int, region: Region, closed: bool) -> int:
    """One past what ends a span at `end`: up to `after`, where something closes it, and then white
    space up to the end of the line, or of the region and what ends that."""
    blank = BLANK.match(text, after, region.end)
    assert blank is not None
    turn = region.stop <= len(text)
    if turn and blank.end() == region.end:
        return region.stop
    if closed:
        return after
    newline = text.find("\n", after, blank.end())
    if newline >= 0:
        return newline + 1
    return region.stop if blank.end() == region.end else end
