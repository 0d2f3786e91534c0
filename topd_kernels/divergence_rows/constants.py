"""The numbers of a row for Triton: the records of its parts made one, which the sweeps and the last kernel read."""

import triton
import triton.language as tl

from topd_kernels.divergence_rows.leading import merged
from topd_kernels.divergence_rows.records import (
    PART_CENTRE,
    PART_FINITE,
    PART_ONLY_STUDENT,
    PART_ONLY_TEACHER,
    PART_STUDENT_MODE,
    PART_STUDENT_REST,
    PART_STUDENT_TAIL_REST,
    PART_STUDENT_TAIL_TOP,
    PART_STUDENT_TOP,
    PART_TEACHER_AT_MODE,
    PART_TEACHER_MODE,
    PART_TEACHER_REST,
    PART_TEACHER_TAIL_REST,
    PART_TEACHER_TAIL_TOP,
    PART_TEACHER_TOP,
    ROW_CENTRE,
    ROW_FINITE,
    ROW_ONLY_STUDENT,
    ROW_ONLY_TEACHER,
    ROW_STUDENT_LOG_REST,
    ROW_STUDENT_LOGPROB,
    ROW_STUDENT_LOST,
    ROW_STUDENT_MODE,
    ROW_STUDENT_SHARE,
    ROW_STUDENT_TOP,
    ROW_TEACHER_LOG_REST,
    ROW_TEACHER_LOGPROB,
    ROW_TEACHER_LOST,
    ROW_TEACHER_MODE,
    ROW_TEACHER_SHARE,
    ROW_TEACHER_TOP,
)
from topd_kernels.shared.logits import logits_of
from topd_kernels.shared.records import load_field, store_field
from topd_kernels.shared.row_math import log1p, number


@triton.jit
def _of_parts(Parts, row, mask, splits, rows, field, TOP: tl.constexpr, MODE: tl.constexpr, REST: tl.constexpr):
    """Merge the parts of one side's statistics, whose fields are TOP, MODE and REST: return top, mode, rest, and E's sum, which
    goes by the teacher's logit at the top (and means something on the student's side alone)."""
    top = load_field(Parts, TOP, field, row, mask)
    mode = load_field(Parts, MODE, field, row, mask)
    rest = load_field(Parts, REST, field, row, mask)
    there = load_field(Parts, PART_TEACHER_AT_MODE, field, row, mask)
    w = load_field(Parts, PART_CENTRE, field, row, mask)
    for split in range(1, splits):
        Part = Parts + split * rows + row
        other_top = tl.load(Part + TOP * field, mask=mask, other=0.0)
        other_mode = tl.load(Part + MODE * field, mask=mask, other=0.0)
        other_rest = tl.load(Part + REST * field, mask=mask, other=0.0)
        other_there = tl.load(Part + PART_TEACHER_AT_MODE * field, mask=mask, other=0.0)
        other_w = tl.load(Part + PART_CENTRE * field, mask=mask, other=0.0)
        top, mode, rest, there, w = merged(top, mode, rest, there, w, other_top, other_mode, other_rest, other_there, other_w)
    return top, mode, rest, w


@triton.jit
def _token_logprob(Product, stride, Bias, biased, row, token, vocab, mask, inner, outer, top, log_rest, GENERAL: tl.constexpr):
    """Return log p(token); -inf for one outside the vocabulary."""
    inside = mask & (token >= 0) & (token < vocab)
    y = tl.load(Product + row * stride + token, mask=inside, other=0.0)
    cap = number(outer, y.dtype)
    y = logits_of(y, Bias, token, inside, biased != 0, number(inner, y.dtype), cap, cap > 0, GENERAL)
    return tl.where(inside, (y - top) - log_rest, float("-inf"))


@triton.jit
def _lost(Parts, row, mask, field, top, log_rest, TOP: tl.constexpr, REST: tl.constexpr):
    """Return the mass beyond the common vocabulary, whose fields are TOP and REST, as a share of all."""
    tail_top = load_field(Parts, TOP, field, row, mask)
    tail_rest = load_field(Parts, REST, field, row, mask)
    gap = (tail_top - top) + (log1p(tail_rest) - log_rest)
    return tl.where(tail_top == float("-inf"), 0.0, 1 / (1 + tl.exp(-gap)))


@triton.jit(
    do_not_specialize=["rows", "splits", "student_biased", "teacher_biased", "has_tokens"],
    do_not_specialize_on_alignment=["Tokens"],
)
def constants(
    Student, student_stride, StudentBias, student_biased, student_inner: tl.float64, student_outer: tl.float64,
    Teacher, teacher_stride, TeacherBias, teacher_biased, teacher_inner: tl.float64, teacher_outer: tl.float64,
    Parts, Row, Tokens, has_tokens, rows, splits, vocab, TAILS: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the parts of rows; write their records of Row."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    row = row.to(tl.int64)
    field = splits.to(tl.int64) * rows
    s_top, s_mode, s_rest, w = _of_parts(
        Parts, row, mask, splits, rows, field, PART_STUDENT_TOP, PART_STUDENT_MODE, PART_STUDENT_REST
    )  # fmt: skip
    t_top, t_mode, t_rest, _ = _of_parts(
        Parts, row, mask, splits, rows, field, PART_TEACHER_TOP, PART_TEACHER_MODE, PART_TEACHER_REST
    )  # fmt: skip
    dtype = Parts.dtype.element_ty
    only_t = tl.zeros([BLOCK], dtype)
    only_s = tl.zeros([BLOCK], dtype)
    all_finite = only_s + 1
    for split in range(splits):
        Part = Parts + split * rows
        only_t = tl.maximum(only_t, load_field(Part, PART_ONLY_TEACHER, field, row, mask))
        only_s = tl.maximum(only_s, load_field(Part, PART_ONLY_STUDENT, field, row, mask))
        all_finite = tl.minimum(all_finite, load_field(Part, PART_FINITE, field, row, mask))
    s_log = log1p(s_rest)
    t_log = log1p(t_rest)
    infinity = float("inf")
    finite = (tl.abs(s_top) < infinity) & (tl.abs(t_top) < infinity) & (s_rest < infinity) & (t_rest < infinity)
    store_field(Row, ROW_STUDENT_TOP, rows, row, s_top, mask)
    store_field(Row, ROW_STUDENT_MODE, rows, row, s_mode, mask)
    store_field(Row, ROW_STUDENT_LOG_REST, rows, row, s_log, mask)
    store_field(Row, ROW_STUDENT_SHARE, rows, row, 1 / (1 + s_rest), mask)
    store_field(Row, ROW_TEACHER_TOP, rows, row, t_top, mask)
    store_field(Row, ROW_TEACHER_MODE, rows, row, t_mode, mask)
    store_field(Row, ROW_TEACHER_LOG_REST, rows, row, t_log, mask)
    store_field(Row, ROW_TEACHER_SHARE, rows, row, 1 / (1 + t_rest), mask)
    store_field(Row, ROW_FINITE, rows, row, tl.where(finite, 1 + all_finite, 0.0), mask)
    store_field(Row, ROW_ONLY_TEACHER, rows, row, only_t.to(dtype), mask)
    store_field(Row, ROW_ONLY_STUDENT, rows, row, only_s.to(dtype), mask)
    store_field(Row, ROW_CENTRE, rows, row, w / (1 + s_rest), mask)
    if has_tokens != 0:
        token = tl.load(Tokens + row, mask=mask, other=0)
        logprob = _token_logprob(Student, student_stride, StudentBias, student_biased, row, token, vocab, mask,
                                 student_inner, student_outer, s_top, s_log, GENERAL)  # fmt: skip
        store_field(Row, ROW_STUDENT_LOGPROB, rows, row, logprob, mask)
        logprob = _token_logprob(Teacher, teacher_stride, TeacherBias, teacher_biased, row, token, vocab, mask,
                                 teacher_inner, teacher_outer, t_top, t_log, GENERAL)  # fmt: skip
        store_field(Row, ROW_TEACHER_LOGPROB, rows, row, logprob, mask)
    if TAILS:
        s_lost = _lost(Parts, row, mask, field, s_top, s_log, PART_STUDENT_TAIL_TOP, PART_STUDENT_TAIL_REST)
        store_field(Row, ROW_STUDENT_LOST, rows, row, s_lost, mask)
        t_lost = _lost(Parts, row, mask, field, t_top, t_log, PART_TEACHER_TAIL_TOP, PART_TEACHER_TAIL_REST)
        store_field(Row, ROW_TEACHER_LOST, rows, row, t_lost, mask)
