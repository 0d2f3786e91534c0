"""A teacher's head that several processes share, its rows where the student's are."""

from typing import Any

from topd.head import Head


class Aligned:
    """Move the rows of one teacher's head: once, and again only where its weight is another.

    Two vocabularies of different sizes, 151,936 beside 152,064, are cut at different tokens; a divergence compares rows of the
    same ones. All ranks of the group call it together.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._head: Head | None = None

    def __call__(self, teacher: Head, student: Head) -> Head:
        """Return the teacher's head, as it came where there is nothing to move."""
        own, other = student.shard, teacher.shard
        if own is None or other is None or own.group != other.group or own.vocab == other.vocab:
            return teacher
        key = teacher.weight.data_ptr(), teacher.weight._version, student.bounds()
        if self._head is None or self._key != key:
            self._head, self._key = teacher.detach().resharded(like=student), key
        return self._head
