"""Where the teacher's signal comes from: a `TeacherSource` gives a batch's rows theirs."""

from sadkern.teacher.build import build
from sadkern.teacher.cached import CachedTeacher, MissingError, store_for
from sadkern.teacher.online import OnlineTeacher
from sadkern.teacher.served import ServedTeacher, ServerError
from sadkern.teacher.source import TeacherSource

__all__ = [
    "CachedTeacher",
    "MissingError",
    "OnlineTeacher",
    "ServedTeacher",
    "ServerError",
    "TeacherSource",
    "build",
    "store_for",
]
