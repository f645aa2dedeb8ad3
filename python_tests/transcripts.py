"""Transcripts and chats made for tests, and what was found in them."""

from __future__ import annotations


def labelled(found):
    return [(kind, found.text[start:end]) for start, end, kind in found.spans]


def chat(*turns):
    """A chat of alternating user and model turns, the user first."""
    return [
        {"role": "user" if i % 2 == 0 else "assistant", "content": content}
        for i, content in enumerate(turns)
    ]
