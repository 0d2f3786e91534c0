"""Records: tensors of fields, [fields, rows] or [fields, splits, rows], that one kernel writes and another one, or topd, reads.

A field's name is its place in the record. Kernels that write a record and kernels that read it use the same names; those of an
op's own records stand in its folder.
"""

from collections.abc import Iterator

import triton
import triton.language as tl


def numbered(count: int) -> "Iterator[tl.constexpr]":
    """Return the numbers below count, for as many names."""
    return (tl.constexpr(number) for number in range(count))


# Scores [SCORES, rows]: in the order of topd.scores.FIELDS.
SCORES = tl.constexpr(9)
(
    SCORE_FORWARD_KL,
    SCORE_REVERSE_KL,
    SCORE_STUDENT_ENTROPY,
    SCORE_TEACHER_ENTROPY,
    SCORE_STUDENT_LOGPROB,
    SCORE_TEACHER_LOGPROB,
    SCORE_TOP1_AGREEMENT,
    SCORE_STUDENT_LOST_MASS,
    SCORE_TEACHER_LOST_MASS,
) = numbered(9)


@triton.jit
def load_field(Record, FIELD: tl.constexpr, stride, entries, mask):
    """Return the entries of a field; fields lie `stride` elements apart. 0 where masked."""
    return tl.load(Record + FIELD * stride + entries, mask=mask, other=0.0)


@triton.jit
def store_field(Record, FIELD: tl.constexpr, stride, entries, value, mask):
    """Write the entries of a field; fields lie `stride` elements apart."""
    tl.store(Record + FIELD * stride + entries, value, mask=mask)
