"""A transcript with its spans in colour: REASON blue, ACT red, as in the paper's Figure 7."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.text import Text

from sadkern.spans import ACT, REASON, UNSUPERVISED, Segmentation

COLOURS = {REASON: "blue", ACT: "red"}
STYLES = {UNSUPERVISED: "dim", REASON: "bold blue", ACT: "bold red"}


class Part(NamedTuple):
    """Some of the text, and what it is trained as."""

    text: str
    kind: int


def parts(found: Segmentation, shown: int | None = None) -> Iterator[Part]:
    """All of the text, in order; of what is not supervised `shown` characters at either end."""
    reached = 0
    for start, end, kind in found.spans:
        yield Part(_shortened(found.text[reached:start], shown), UNSUPERVISED)
        yield Part(found.text[start:end], kind)
        reached = end
    yield Part(_shortened(found.text[reached:], shown), UNSUPERVISED)


def in_terminal(found: Segmentation, shown: int | None = 160) -> Text:
    """For rich. Characters that would steer the terminal are shown as pictures of them."""
    text = Text()
    for part in parts(found, shown):
        text.append(_harmless(part.text), style=STYLES[part.kind])
    return text


def _shortened(text: str, shown: int | None) -> str:
    if shown is None or len(text) <= 2 * shown + 40:
        return text
    left_out = len(text) - 2 * shown
    return f"{text[:shown]} [.. {left_out:,} characters ..] {text[-shown:]}"


PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def _harmless(text: str) -> str:
    return text.replace("\r\n", "\n").translate(PICTURES)
