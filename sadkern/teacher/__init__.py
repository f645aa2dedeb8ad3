"""Where the teacher's signal comes from: a `TeacherSource` gives a batch's rows theirs."""

from sadkern.teacher.build import build
from sadkern.teacher.cached import CachedTeacher, MissingError, store_for
from sadkern.teacher.distant import DistantTeacher, Link, LinkError, teach
from sadkern.teacher.entropy import mean_entropies
from sadkern.teacher.labels import HardLabels
from sadkern.teacher.online import OnlineTeacher
from sadkern.teacher.served import ServedTeacher, ServerError
from sadkern.teacher.source import TeacherSource

__all__ = [
    "CachedTeacher",
    "DistantTeacher",
    "HardLabels",
    "Link",
    "LinkError",
    "MissingError",
    "OnlineTeacher",
    "ServedTeacher",
    "ServerError",
    "TeacherSource",
    "build",
    "mean_entropies",
    "store_for",
    "teach",
]
