"""The end of divergence_rows: the sums of a row's parts made its value and scores."""

import triton
import triton.language as tl

from topd_kernels.divergence_rows.records import (
    ROW_FINITE,
    ROW_ONLY_STUDENT,
    ROW_ONLY_TEACHER,
    ROW_STUDENT_LOGPROB,
    ROW_STUDENT_LOST,
    ROW_STUDENT_MODE,
    ROW_TEACHER_LOGPROB,
    ROW_TEACHER_LOST,
    ROW_TEACHER_MODE,
    SUM_FORWARD_KL,
    SUM_REVERSE_KL,
    SUM_STUDENT_ENTROPY,
    SUM_TEACHER_ENTROPY,
    SUM_VALUE,
)
from topd_kernels.divergence_rows.terms import FORWARD_KL, REVERSE_KL
from topd_kernels.shared.records import (
    SCORE_FORWARD_KL,
    SCORE_REVERSE_KL,
    SCORE_STUDENT_ENTROPY,
    SCORE_STUDENT_LOGPROB,
    SCORE_STUDENT_LOST_MASS,
    SCORE_TEACHER_ENTROPY,
    SCORE_TEACHER_LOGPROB,
    SCORE_TEACHER_LOST_MASS,
    SCORE_TOP1_AGREEMENT,
    load_field,
    store_field,
)
from topd_kernels.shared.row_math import number


@triton.jit
def _summed(Sums, FIELD: tl.constexpr, field, row, mask, splits, rows):
    """Return the sum of a field over the parts of rows."""
    total = load_field(Sums, FIELD, field, row, mask)
    for split in range(1, splits):
        total += load_field(Sums, FIELD, field, split * rows + row, mask)
    return total


@triton.jit
def _store_scores(
    Row, Sums, Scores, row, mask, rows, splits, field, finite, only_t, only_s, s_logprob, t_logprob, TAILS: tl.constexpr,
):  # fmt: skip
    """Write the scores of rows; NaN for a row without distributions."""
    infinity = float("inf")
    nan = float("nan")
    forward = tl.where(only_t, infinity, _summed(Sums, SUM_FORWARD_KL, field, row, mask, splits, rows))
    reverse = tl.where(only_s, infinity, _summed(Sums, SUM_REVERSE_KL, field, row, mask, splits, rows))
    s_mode = load_field(Row, ROW_STUDENT_MODE, rows, row, mask)
    t_mode = load_field(Row, ROW_TEACHER_MODE, rows, row, mask)
    store_field(Scores, SCORE_FORWARD_KL, rows, row, tl.where(finite, forward, nan), mask)
    store_field(Scores, SCORE_REVERSE_KL, rows, row, tl.where(finite, reverse, nan), mask)
    s_entropy = _summed(Sums, SUM_STUDENT_ENTROPY, field, row, mask, splits, rows)
    t_entropy = _summed(Sums, SUM_TEACHER_ENTROPY, field, row, mask, splits, rows)
    store_field(Scores, SCORE_STUDENT_ENTROPY, rows, row, tl.where(finite, s_entropy, nan), mask)
    store_field(Scores, SCORE_TEACHER_ENTROPY, rows, row, tl.where(finite, t_entropy, nan), mask)
    store_field(Scores, SCORE_STUDENT_LOGPROB, rows, row, tl.where(finite, s_logprob, nan), mask)
    store_field(Scores, SCORE_TEACHER_LOGPROB, rows, row, tl.where(finite, t_logprob, nan), mask)
    agreement = (s_mode == t_mode).to(forward.dtype)
    store_field(Scores, SCORE_TOP1_AGREEMENT, rows, row, tl.where(finite, agreement, nan), mask)
    s_lost = tl.zeros(forward.shape, forward.dtype)
    t_lost = s_lost
    if TAILS:
        s_lost = load_field(Row, ROW_STUDENT_LOST, rows, row, mask)
        t_lost = load_field(Row, ROW_TEACHER_LOST, rows, row, mask)
    store_field(Scores, SCORE_STUDENT_LOST_MASS, rows, row, tl.where(finite, s_lost, nan), mask)
    store_field(Scores, SCORE_TEACHER_LOST_MASS, rows, row, tl.where(finite, t_lost, nan), mask)


@triton.jit(do_not_specialize=["rows", "splits", "has_tokens"])
def finish(
    Row, Sums, Value, Scores, Finite, rows, splits, has_tokens, hard_weight: tl.float64,
    KIND: tl.constexpr, SCORES: tl.constexpr, TAILS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the sums of rows; write their values, scores and whether both distributions exist."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    row = row.to(tl.int64)
    field = splits.to(tl.int64) * rows
    finite = load_field(Row, ROW_FINITE, rows, row, mask) != 0
    only_t = load_field(Row, ROW_ONLY_TEACHER, rows, row, mask) != 0
    only_s = load_field(Row, ROW_ONLY_STUDENT, rows, row, mask) != 0
    value = _summed(Sums, SUM_VALUE, field, row, mask, splits, rows)
    if KIND == FORWARD_KL:
        value = tl.where(only_t, float("inf"), value)
    if KIND == REVERSE_KL:
        value = tl.where(only_s, float("inf"), value)
    s_logprob = tl.zeros([BLOCK], value.dtype)
    t_logprob = s_logprob
    if has_tokens != 0:
        s_logprob = load_field(Row, ROW_STUDENT_LOGPROB, rows, row, mask)
        t_logprob = load_field(Row, ROW_TEACHER_LOGPROB, rows, row, mask)
        hard = number(hard_weight, value.dtype)
        value -= tl.where(hard == 0, 0.0, hard * s_logprob)
    tl.store(Value + row, tl.where(finite, value, float("nan")), mask=mask)
    tl.store(Finite + row, finite, mask=mask)
    if SCORES:
        _store_scores(Row, Sums, Scores, row, mask, rows, splits, field, finite, only_t, only_s, s_logprob, t_logprob, TAILS)
