"""Where the teacher's signal comes from: a `TeacherSource` gives a batch's rows theirs."""

from sadkern.teacher.online import OnlineTeacher
from sadkern.teacher.source import TeacherSource

__all__ = ["OnlineTeacher", "TeacherSource"]
