r"""From an agent's transcript to the rows it is trained on.

`segment` finds the [REASON] and [ACT] spans as characters, `align` carries them over to tokens.

>>> from sadkern.spans import ACT, REASON, segment
>>> found = segment("Goal: cool a mug\nReasoning: A fridge cools.\nAction: open fridge")
>>> [(found.text[start:end], kind) for start, end, kind in found.spans]
[('A fridge cools.', 1), ('open fridge', 2)]
>>> (REASON, ACT)
(1, 2)
"""

from sadkern.spans.align import Example, align, windows
from sadkern.spans.kinds import ACT, REASON, UNSUPERVISED
from sadkern.spans.profile import PROFILES, Marker, Profile, load_profile
from sadkern.spans.segment import Segmentation, Span, segment

__all__ = [
    "ACT",
    "PROFILES",
    "REASON",
    "UNSUPERVISED",
    "Example",
    "Marker",
    "Profile",
    "Segmentation",
    "Span",
    "align",
    "load_profile",
    "segment",
    "windows",
]
