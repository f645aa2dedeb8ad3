"""How agents' transcripts are written: profiles, as data.

A profile says what the marker of a thought looks like, of an action, of what is neither, and how
far each one's content goes. Those that come along are the files of `sadkern/spans/profiles`; one's
own is a file like them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from sadkern.spans.kinds import ACT, REASON, UNSUPERVISED

# In the order in which they are preferred where a transcript speaks for several alike.
PROFILES = (
    *("react-webshop", "eto", "paper", "fireact", "react-hotpotqa", "react-alfworld"),
    *("chat", "agenttuning", "sweagent"),
)
ALSO = {"agentgym": "eto"}  # names that people look for
KINDS = {"none": UNSUPERVISED, "reason": REASON, "act": ACT}
READS = ("text", "turns", "both")


@dataclass(frozen=True)
class Marker:
    """One way in which a content begins.

    `pattern`: a regular expression for the marker alone, its colon included, without capturing
    groups. `kind`: what the content is: REASON, ACT or UNSUPERVISED. `until`: "line", the content
    ends with its line; "marker", it goes on to the next marker; else a regular expression for what
    closes it. `anywhere`: not at the start of a line alone, behind blanks at most.

    Keep repeats from meeting (`a* *` and the like), or a long line costs its square.
    """

    pattern: str
    kind: int = UNSUPERVISED
    until: str = "line"
    anywhere: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS.values():
            raise ValueError(f"marker {self.pattern!r}: kind {self.kind!r}, expected 0, 1 or 2")
        compiled = _compiled(self.pattern, f"marker {self.pattern!r}")
        if compiled.groups:
            raise ValueError(f"marker {self.pattern!r}: capturing group, expected only (?:..)")
        if compiled.match(""):
            raise ValueError(f"marker {self.pattern!r}: matches the empty string, and so any line")
        if self.closing is not None and self.closing.match(""):
            raise ValueError(f"marker {self.pattern!r}: its end matches the empty string")

    @cached_property
    def closing(self) -> re.Pattern[str] | None:
        """What ends the content, where that is neither its line nor the next marker."""
        if self.until in ("line", "marker"):
            return None
        return _compiled(self.until, f"until of marker {self.pattern!r}")


class Unmarked(NamedTuple):
    """What text of the model's is that stands behind no marker."""

    before_act: int = UNSUPERVISED  # where an action comes later in the turn
    otherwise: int = UNSUPERVISED


class Piece(NamedTuple):
    """A part of the model's text. `begin`: of its marker; `start` and `end`: of its content, blanks
    included; `after`: one past what closes it. `marked`: whether it has a marker."""

    kind: int
    begin: int
    start: int
    end: int
    after: int
    marked: bool


@dataclass(frozen=True)
class Profile:
    r"""A format of transcripts.

    `markers`: where two match, the earlier one counts. `reads`: "text", transcripts in one piece;
    "turns", those of a chat, where only the model's own turns are looked at; or "both". `unmarked`:
    what the model's text is that has no marker, in turns. `signature`: a regular expression without
    which `profile="auto"` does not think of this one.

    >>> from sadkern.spans.kinds import ACT, REASON
    >>> mine = Profile("mine", (Marker("Plan:", REASON, until="marker"), Marker("Do:", ACT)))
    >>> [(piece.kind, piece.start, piece.end) for piece in mine.scan("Plan: eat\nDo: cook")]
    [(1, 5, 10), (2, 13, 18)]
    """

    name: str
    markers: tuple[Marker, ...]
    about: str = ""
    reads: str = "both"
    unmarked: Unmarked = field(default=Unmarked())
    signature: str | None = None

    def __post_init__(self) -> None:
        if not self.markers:
            raise ValueError(f"profile {self.name!r} has no markers: expected one at least")
        if self.reads not in READS:
            raise ValueError(
                f"profile {self.name!r}: reads {self.reads!r}, expected {', '.join(READS)}"
            )
        if self.signature is not None:
            _compiled(self.signature, f"signature of profile {self.name!r}")

    @cached_property
    def _scanner(self) -> tuple[re.Pattern[str], list[Marker]]:
        ordered = sorted(self.markers, key=lambda marker: marker.anywhere)
        lines, anywhere = (
            "|".join(f"({marker.pattern})" for marker in ordered if marker.anywhere is one)
            for one in (False, True)
        )
        alternatives = [rf"^[ \t]*(?:{lines})"] if lines else []
        alternatives += [anywhere] if anywhere else []
        return re.compile("|".join(alternatives), re.MULTILINE), ordered

    def signed(self, text: str) -> bool:
        """Whether `text` has the signature."""
        return self.signature is not None and bool(re.search(self.signature, text, re.MULTILINE))

    def scan(self, text: str) -> Iterator[Piece]:
        """The pieces of `text`, in order; what has no marker is one of kind 0. One pass."""
        scanner, markers = self._scanner
        absent: set[str] = set()  # ends that do not come any more
        match, reached = scanner.search(text), 0
        while match:
            assert match.lastindex is not None  # every alternative is exactly one group
            if reached < match.start():
                yield _unmarked(reached, match.start())
            marker, start = markers[match.lastindex - 1], match.end()
            closed = None
            if marker.closing is not None and marker.until not in absent:
                closed = marker.closing.search(text, start)
                if closed is None:
                    absent.add(marker.until)
            following = scanner.search(text, closed.end() if closed else start)
            end = reached = following.start() if following else len(text)
            if closed:
                end, reached = closed.span()
            elif marker.until == "line":
                newline = text.find("\n", start, end)
                end = reached = end if newline < 0 else newline
            yield Piece(marker.kind, match.start(), start, end, reached, True)
            match = following
        if reached < len(text):
            yield _unmarked(reached, len(text))


def _unmarked(start: int, end: int) -> Piece:
    return Piece(UNSUPERVISED, start, start, end, end, False)


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(f"(?:{pattern})", re.MULTILINE)
    except re.error as error:
        raise ValueError(f"{name}: expected a regular expression ({error})") from error


def profile_named(name: str | Path | Profile) -> Profile:
    """The profile itself, the one that comes along under this name, or that of a YAML file."""
    if isinstance(name, Profile):
        return name
    if name in PROFILES or name in ALSO:
        return builtin()[ALSO.get(str(name), str(name))]
    if isinstance(name, str | Path) and Path(name).suffix in (".yaml", ".yml"):
        return load_profile(name)
    raise ValueError(
        f"profile {name!r}: expected auto, {', '.join(PROFILES)}, a Profile or a .yaml file of one"
    )


@cache
def builtin() -> dict[str, Profile]:
    """Those that come along, by name."""
    folder = files("sadkern.spans") / "profiles"
    texts = {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in PROFILES}
    return {name: _parsed(text, f"{name}.yaml") for name, text in texts.items()}


def load_profile(path: str | Path) -> Profile:
    """A profile from a YAML file, as those of `sadkern/spans/profiles` are.

    ValueError: the file is not one, naming the key that is wrong. FileNotFoundError: no such file.
    """
    return _parsed(Path(path).read_text(encoding="utf-8"), str(path))


def _parsed(text: str, place: str) -> Profile:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{place}: expected YAML ({error})") from error
    keys = ("name", "about", "reads", "signature", "unmarked", "markers")
    data = _mapping(data, keys, place)
    for key in ("name", "markers"):
        if not data.get(key):
            raise ValueError(f"{place}: {key!r} is missing")
    if not isinstance(data["markers"], list):
        raise ValueError(f"{place}: markers is {data['markers']!r}, expected a list")
    markers = []
    for i, given in enumerate(data["markers"]):
        at = f"{place}: markers[{i}]"
        made = _mapping(given, ("match", "kind", "until", "anywhere"), at)
        if "match" not in made:
            raise ValueError(f"{at}: 'match' is missing, a regular expression")
        kind, until = _kind(made.get("kind", "none"), at), str(made.get("until", "line"))
        anywhere = made.get("anywhere", False)
        if not isinstance(anywhere, bool):
            raise ValueError(f"{at}: anywhere {anywhere!r}, expected true or false")
        markers.append(Marker(str(made["match"]), kind, until, anywhere))
    unmarked = _mapping(data.get("unmarked", {}), Unmarked._fields, f"{place}: unmarked")
    return Profile(
        name=str(data["name"]),
        markers=tuple(markers),
        about=str(data.get("about", "")).strip(),
        reads=str(data.get("reads", "both")),
        unmarked=Unmarked(**{key: _kind(kind, place) for key, kind in unmarked.items()}),
        signature=str(data["signature"]) if "signature" in data else None,
    )


def _mapping(given: Any, keys: tuple[str, ...], place: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{place}: got {given!r}, expected a mapping of {', '.join(keys)}")
    unknown = [key for key in given if key not in keys]
    if unknown:
        raise ValueError(f"{place}: {unknown[0]!r} is unknown, expected {', '.join(keys)}")
    return given


def _kind(name: Any, place: str) -> int:
    if name not in KINDS:
        raise ValueError(f"{place}: kind {name!r}, expected {', '.join(KINDS)}")
    return KINDS[name]
