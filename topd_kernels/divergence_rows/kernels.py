"""The sweeps of divergence_rows, after the statistics: values, scores and gradients of a part of a row, and their sums.

Formulas are those of python_api/topd/ops/linear_divergence/eager.py.
"""

import triton
import triton.language as tl

from topd_kernels.divergence_rows.records import (
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
    SUM_CENTRE,
    SUM_FORWARD_KL,
    SUM_REVERSE_KL,
    SUM_STUDENT_ENTROPY,
    SUM_TEACHER_ENTROPY,
    SUM_VALUE,
)
from topd_kernels.divergence_rows.statistics import logits_pair
from topd_kernels.divergence_rows.terms import FORWARD_KL, REVERSE_KL, log_ratio, term_of
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
from topd_kernels.shared.row_math import FAR, expm1, held, kl_term, logits_of, number, phi_pair, slope_of


@triton.jit
def _mode_a(
    Row, rows, Teacher, TeacherBias, teacher_biased, teacher_inner, teacher_outer, s_top, s_share, t_top, t_share, rest_gap,
    finite, parameter, complement, KIND: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    """Return A at the student's most likely entry."""
    dtype = Teacher.dtype.element_ty
    mode = tl.load(Row + ROW_STUDENT_MODE * rows).to(tl.int64)
    outer = number(teacher_outer, dtype)
    y = logits_of(tl.load(Teacher + mode), TeacherBias, mode, finite, teacher_biased != 0, number(teacher_inner, dtype),
                  outer, outer > 0, GENERAL)  # fmt: skip
    d = log_ratio(s_top, y, s_top, t_top, rest_gap)
    _, a, _ = term_of(tl.exp(y - t_top) * t_share, s_share, d, parameter, complement, KIND)
    return a


@triton.jit
def _centre(Row, Sums, row, rows, splits, zero, KIND: tl.constexpr):
    """Return E, and whether the row's gradient is 0 because its value is inf."""
    centre = zero
    dead = False
    if KIND == REVERSE_KL:
        centre = tl.load(Row + ROW_CENTRE * rows)
        dead = tl.load(Row + ROW_ONLY_STUDENT * rows) != 0
    elif KIND != FORWARD_KL:
        field = splits.to(tl.int64) * rows
        for split in range(splits):
            centre += tl.load(Sums + SUM_CENTRE * field + split * rows + row)
    return centre, dead


@triton.jit
def _store_nothing(Grad, start, end, BLOCK: tl.constexpr):
    """Write 0 into the entries [start, end) of a row's gradient: those beyond the common vocabulary."""
    for block in range(start, end, BLOCK):
        entries = block + tl.arange(0, BLOCK)
        tl.store(Grad + entries, tl.zeros([BLOCK], Grad.dtype.element_ty), mask=entries < end)


@triton.jit
def _store_sums(Sums, field, value, centres, forward, reverse, s_entropy, t_entropy, SCORES: tl.constexpr):
    """Write the record of a part of a row; Sums points at the part."""
    tl.store(Sums + SUM_VALUE * field, tl.sum(value, 0))
    tl.store(Sums + SUM_CENTRE * field, tl.sum(centres, 0))
    if SCORES:
        tl.store(Sums + SUM_FORWARD_KL * field, tl.sum(forward, 0))
        tl.store(Sums + SUM_REVERSE_KL * field, tl.sum(reverse, 0))
        tl.store(Sums + SUM_STUDENT_ENTROPY * field, tl.sum(s_entropy, 0))
        tl.store(Sums + SUM_TEACHER_ENTROPY * field, tl.sum(t_entropy, 0))


@triton.jit(
    do_not_specialize=["rows", "splits", "student_biased", "teacher_biased", "has_tokens", "block_count"],
    do_not_specialize_on_alignment=["Tokens"],
)
def sweep(
    Student, student_stride, StudentBias, student_biased, student_inner: tl.float64, student_outer: tl.float64,
    Teacher, teacher_stride, TeacherBias, teacher_biased, teacher_inner: tl.float64, teacher_outer: tl.float64,
    Row, Tokens, has_tokens, Sums, Grad, grad_stride, rows, splits, block_count, vocab, student_width,
    parameter: tl.float64, complement: tl.float64, hard_weight: tl.float64, grad_scale: tl.float64,
    KIND: tl.constexpr, VALUE: tl.constexpr, SCORES: tl.constexpr, GRAD: tl.constexpr, GENERAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a part of a row of both tiles once. VALUE: write its record of Sums. GRAD: write the gradient into Grad."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    Student += row * student_stride
    Teacher += row * teacher_stride
    Row += row
    dtype = Student.dtype.element_ty
    parameter = number(parameter, dtype)
    complement = number(complement, dtype)
    s_top = tl.load(Row + ROW_STUDENT_TOP * rows)
    s_log = tl.load(Row + ROW_STUDENT_LOG_REST * rows)
    s_share = tl.load(Row + ROW_STUDENT_SHARE * rows)
    t_top = tl.load(Row + ROW_TEACHER_TOP * rows)
    t_log = tl.load(Row + ROW_TEACHER_LOG_REST * rows)
    t_share = tl.load(Row + ROW_TEACHER_SHARE * rows)
    finite = tl.load(Row + ROW_FINITE * rows) != 0
    rest_gap = t_log - s_log
    a_mode = s_top * 0
    if KIND >= REVERSE_KL:  # A is taken relative to the student's most likely entry
        a_mode = _mode_a(Row, rows, Teacher, TeacherBias, teacher_biased, teacher_inner, teacher_outer, s_top, s_share,
                         t_top, t_share, rest_gap, finite, parameter, complement, KIND, GENERAL)  # fmt: skip
    centre = s_top * 0
    token = row * 0 - 1
    token_part = s_top * 0
    hard = s_top * 0
    dead = False
    if GRAD:
        centre, dead = _centre(Row, Sums, row, rows, splits, centre, KIND)
        if has_tokens != 0:
            token = tl.load(Tokens + row)
            hard = number(hard_weight, dtype)
            token_part = hard * expm1(tl.load(Row + ROW_STUDENT_LOGPROB * rows))
    outer_s = number(student_outer, dtype)
    inner_s = number(student_inner, dtype)
    steep = tl.where(outer_s > 0, inner_s * outer_s, inner_s) * number(grad_scale, dtype)
    unit = 1 / tl.where(outer_s > 0, outer_s, 1.0)

    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], dtype)
    value, centres, forward, reverse, s_entropy, t_entropy = zero, zero, zero, zero, zero, zero
    start = split * block_count * BLOCK
    end = tl.minimum(start + block_count * BLOCK, vocab)
    for block in range(start, end, BLOCK):
        entries = block + lanes
        mask = entries < end
        ys, yt = logits_pair(Student, Teacher, StudentBias, TeacherBias, entries, mask, student_biased, teacher_biased,
                              student_inner, student_outer, teacher_inner, teacher_outer, GENERAL)  # fmt: skip
        d = log_ratio(ys, yt, s_top, t_top, rest_gap)
        p_student = tl.exp(ys - s_top) * s_share
        p_teacher = tl.exp(yt - t_top) * t_share
        term, a, part = term_of(p_teacher, p_student, d, parameter, complement, KIND)
        if KIND >= REVERSE_KL:
            a -= a_mode
            part = p_student * a
        if VALUE:
            value += term
            centres += part
        if SCORES:
            near = tl.abs(d) <= 1
            phi_plus, phi_minus = phi_pair(d)
            forward += kl_term(p_teacher, p_student, d, near, phi_plus)
            reverse += kl_term(p_student, p_teacher, -d, near, phi_minus)
            s_entropy -= p_student * tl.maximum((ys - s_top) - s_log, -FAR)
            t_entropy -= p_teacher * tl.maximum((yt - t_top) - t_log, -FAR)
        if GRAD:
            if KIND >= REVERSE_KL:
                grad = tl.where(dead, 0.0, p_student * (a - centre))
            else:
                grad = a - p_student * centre
            grad += tl.where(entries == token, token_part, hard * p_student)
            grad *= slope_of(ys, steep, unit, outer_s > 0, GENERAL)
            grad = held(tl.where(finite, grad, 0.0), Grad.dtype.element_ty)
            tl.store(Grad + row * grad_stride + entries, grad, mask=mask)
    if GRAD:
        if split == 0:
            _store_nothing(Grad + row * grad_stride, vocab, student_width, BLOCK)
    if VALUE:
        Sums += split * rows + row
        field = splits.to(tl.int64) * rows
        _store_sums(Sums, field, value, centres, forward, reverse, s_entropy, t_entropy, SCORES)


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
