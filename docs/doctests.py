"""Docstrings as pages: their examples are blocks of code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"(?:^[ ]*>>>.*\n?(?:^[ ]*\S.*\n?)*)+", re.M)


class Doctests(Extension):
    """What begins with `>>>`, to the next empty line, is fenced."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring and ">>>" in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(match: re.Match[str]) -> str:
    text = match[0].rstrip("\n")
    indent = " " * (len(text) - len(text.lstrip()))
    return f"{indent}```pycon\n{text}\n{indent}```\n"
