"""What the lines that begin a span look like: profiles, as data.

A transcript is cut by markers. A marker stands at the start of a line, behind blanks at most, and
says what its content is; what stands before the first marker is unsupervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

UNSUPERVISED = 0
REASON = 1
ACT = 2

NAMES = {REASON: "REASON", ACT: "ACT"}


@dataclass(frozen=True)
class Marker:
    """One way in which a line can begin.

    `pattern`: a regular expression for the marker alone, its colon included, without capturing
    groups. `kind`: what its content is: REASON, ACT or UNSUPERVISED. `multiline`: the content runs
    to the next marker; otherwise it ends with its line, and the lines up to the next marker are
    unsupervised. Keep repeats from meeting (`a* *` and the like), or a long line costs its square.
    """

    pattern: str
    kind: int = UNSUPERVISED
    multiline: bool = False

    def __post_init__(self) -> None:
        if self.kind not in (UNSUPERVISED, REASON, ACT):
            raise ValueError(f"marker {self.pattern!r}: kind {self.kind!r}, expected 0, 1 or 2")
        try:
            compiled = re.compile(f"(?:{self.pattern})")
        except re.error as error:
            raise ValueError(
                f"marker {self.pattern!r}: expected a regular expression ({error})"
            ) from error
        if compiled.groups:
            raise ValueError(f"marker {self.pattern!r}: capturing group, expected only (?:..)")
        if compiled.match(""):
            raise ValueError(f"marker {self.pattern!r}: matches the empty string, and so any line")


@dataclass(frozen=True)
class Profile:
    """A transcript format: its name and its markers; where two match, the earlier one counts.

    >>> from sadkern.spans.profiles import Marker
    >>> mine = Profile("mine", (Marker("Plan:", REASON, multiline=True), Marker("Do:", ACT)))
    >>> [(marker.kind, start, end) for marker, start, end in mine.scan("Plan: eat\\nDo: cook")]
    [(1, 0, 5), (2, 10, 13)]
    """

    name: str
    markers: tuple[Marker, ...]

    @cached_property
    def _scanner(self) -> re.Pattern[str]:
        alternatives = "|".join(f"({marker.pattern})" for marker in self.markers)
        return re.compile(rf"^[ \t]*(?:{alternatives})", re.MULTILINE)

    def scan(self, text: str, begin: int = 0) -> Iterator[tuple[Marker, int, int]]:
        """Each marker of `text[begin:]` in order: (marker, start of its line, end of the marker).

        Character indices into `text`; `begin` must be the start of a line. One pass.
        """
        for match in self._scanner.finditer(text, begin):
            assert match.lastindex is not None  # every alternative is exactly one group
            yield self.markers[match.lastindex - 1], match.start(), match.end()


# Appendix D.1 and E.1 of the paper. Its patterns take one line of reasoning; that more may follow
# changes nothing for its own data, where each line has a marker.
PAPER = Profile(
    "paper",
    (
        Marker("Reasoning:", REASON, multiline=True),
        Marker("Action:", ACT),
        Marker("Answer:", ACT),
        Marker("(?:Observation|Instruction|Goal|User goal|User intent|Available options):"),
        Marker("(?:Question|Q):"),
    ),
)

# ReAct on HotPotQA and FireAct. `ActionPath n:` is KnowAgent's record of the steps so far, which is
# neither a thought nor an action, but which must end the thought before it.
REACT = Profile(
    "react",
    (
        Marker("Thought(?: ?[0-9]+)? ?:", REASON, multiline=True),
        Marker("Action(?: ?[0-9]+)? ?:", ACT),
        Marker("(?:Observation|ActionPath|Question)(?: ?[0-9]+)? ?:"),
    ),
)

PROFILES = {profile.name: profile for profile in (PAPER, REACT)}
