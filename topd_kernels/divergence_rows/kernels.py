"""The sweeps of divergence_rows, after the statistics: values, scores and gradients of a part of a row, and their sums.

Formulas are those of python_api/topd/ops/linear_divergence/eager.py. A row whose logits are all finite is swept by whole blocks
without a mask; what is left of it, and any other row, with the cases of probability 0.
"""

import triton
import triton.language as tl

from topd_kernels.divergence_rows.records import (
    ROW_CENTRE,
    ROW_FINITE,
    ROW_ONLY_STUDENT,
    ROW_STUDENT_LOG_REST,
    ROW_STUDENT_LOGPROB,
    ROW_STUDENT_MODE,
    ROW_STUDENT_SHARE,
    ROW_STUDENT_TOP,
    ROW_TEACHER_LOG_REST,
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
from topd_kernels.divergence_rows.terms import (
    CLIPPED_KL,
    FORWARD_KL,
    REVERSE_KL,
    factor_of_a,
    log_ratio,
    log_ratio_numbers,
    term_of,
)
from topd_kernels.shared.logits import logits_of, slope_of, unmasked_logits
from topd_kernels.shared.row_math import FAR, exp, expm1, held, kl_term, number, phi_pair


@triton.jit
def _mode_a(
    Row, rows, Teacher, TeacherBias, teacher_biased, teacher_inner, teacher_outer, s_top, s_share, t_top, t_share,
    s_first, t_first, shift, rest_gap, finite, parameter, complement, KIND: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    """Return A at the student's most likely entry."""
    dtype = Teacher.dtype.element_ty
    mode = tl.load(Row + ROW_STUDENT_MODE * rows).to(tl.int64)
    outer = number(teacher_outer, dtype)
    y = logits_of(tl.load(Teacher + mode), TeacherBias, mode, finite, teacher_biased != 0, number(teacher_inner, dtype),
                  outer, outer > 0, GENERAL)  # fmt: skip
    d = log_ratio(s_top, y, s_first, t_first, shift, rest_gap, False)
    _, a, _ = term_of(exp(y - t_top) * t_share, s_share, d, parameter, complement, KIND)
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
def _entries(
    ys, yt, s_top, s_log, s_share, s_first, t_top, t_log, t_share, t_first, shift, rest_gap, a_mode, parameter, complement,
    KIND: tl.constexpr, SCORES: tl.constexpr, FINITE: tl.constexpr,
):  # fmt: skip
    """Return p_S, A and the terms of value, E, both KLs and both entropies of entries. FINITE: every logit is."""
    s_gap = ys - s_top
    t_gap = yt - t_top
    d = log_ratio(ys, yt, s_first, t_first, shift, rest_gap, FINITE)
    p_student = exp(s_gap) * s_share
    p_teacher = exp(t_gap) * t_share
    term, a, part = term_of(p_teacher, p_student, d, parameter, complement, KIND)
    if KIND >= REVERSE_KL:
        a -= a_mode
        part = p_student * a
    forward, reverse, s_entropy, t_entropy = d, d, d, d
    if SCORES:
        near = tl.abs(d) <= 1
        phi_plus, phi_minus = phi_pair(d)
        forward = kl_term(p_teacher, p_student, d, near, phi_plus)
        reverse = kl_term(p_student, p_teacher, -d, near, phi_minus)
        s_entropy = s_log - s_gap
        t_entropy = t_log - t_gap
        if not FINITE:
            s_entropy = tl.minimum(s_entropy, FAR)
            t_entropy = tl.minimum(t_entropy, FAR)
        s_entropy *= p_student
        t_entropy *= p_teacher
    return p_student, a, term, part, forward, reverse, s_entropy, t_entropy


@triton.jit
def _grad(p_student, a, centre, slope, KIND: tl.constexpr):
    """Return the gradient to the student's products, but for `factor_of_a`; slope is that of its logits."""
    if KIND >= REVERSE_KL:
        grad = p_student * (a * slope - centre * slope)
    elif KIND == FORWARD_KL:
        grad = a * slope
    else:
        grad = (a - p_student * centre) * slope
    return grad


@triton.jit
def _store_sums(Sums, field, value, centres, forward, reverse, s_entropy, t_entropy, SCORES: tl.constexpr, KIND: tl.constexpr):
    """Write the record of a part of a row; Sums points at the part."""
    tl.store(Sums + SUM_VALUE * field, tl.sum(value, 0))
    if KIND == CLIPPED_KL or KIND > REVERSE_KL:
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
    Grad += row * grad_stride
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
    exists = tl.load(Row + ROW_FINITE * rows)
    finite = exists != 0
    s_first, t_first, shift = log_ratio_numbers(s_top, t_top)
    rest_gap = t_log - s_log
    a_mode = s_top * 0
    if KIND >= REVERSE_KL:  # A is taken relative to the student's most likely entry
        a_mode = _mode_a(Row, rows, Teacher, TeacherBias, teacher_biased, teacher_inner, teacher_outer, s_top, s_share,
                         t_top, t_share, s_first, t_first, shift, rest_gap, finite, parameter, complement,
                         KIND, GENERAL)  # fmt: skip
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
    outer_t = number(teacher_outer, dtype)
    inner_t = number(teacher_inner, dtype)
    steep = tl.where(outer_s > 0, inner_s * outer_s, inner_s) * number(grad_scale, dtype)
    factor = factor_of_a(complement, KIND)
    unit = 1 / tl.where(outer_s > 0, outer_s, 1.0)

    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], dtype)
    value, centres, forward, reverse, s_entropy, t_entropy = zero, zero, zero, zero, zero, zero
    start = split * block_count * BLOCK
    end = tl.minimum(start + block_count * BLOCK, vocab)
    whole = start + tl.maximum(end - start, 0) // BLOCK * BLOCK
    whole = tl.where((exists > 1) & (hard == 0), whole, start)
    for block in range(start, whole, BLOCK):
        entries = block + lanes
        ys = unmasked_logits(tl.load(Student + entries), StudentBias, entries, student_biased, inner_s, outer_s, GENERAL)
        yt = unmasked_logits(tl.load(Teacher + entries), TeacherBias, entries, teacher_biased, inner_t, outer_t, GENERAL)
        p_student, a, term, part, to_t, to_s, s_term, t_term = _entries(
            ys, yt, s_top, s_log, s_share, s_first, t_top, t_log, t_share, t_first, shift, rest_gap, a_mode, parameter,
            complement, KIND, SCORES, True,
        )  # fmt: skip
        if VALUE:
            value += term
            centres += part
        if SCORES:
            forward += to_t
            reverse += to_s
            s_entropy += s_term
            t_entropy += t_term
        if GRAD:
            grad = _grad(p_student, a, centre, slope_of(ys, factor * steep, unit, outer_s > 0, GENERAL), KIND)
            tl.store(Grad + entries, held(grad, Grad.dtype.element_ty))
    for block in range(whole, end, BLOCK):
        entries = block + lanes
        mask = entries < end
        ys, yt = logits_pair(Student, Teacher, StudentBias, TeacherBias, entries, mask, student_biased, teacher_biased,
                              student_inner, student_outer, teacher_inner, teacher_outer, GENERAL)  # fmt: skip
        p_student, a, term, part, to_t, to_s, s_term, t_term = _entries(
            ys, yt, s_top, s_log, s_share, s_first, t_top, t_log, t_share, t_first, shift, rest_gap, a_mode, parameter,
            complement, KIND, SCORES, False,
        )  # fmt: skip
        if VALUE:
            value += term
            centres += part
        if SCORES:
            forward += to_t
            reverse += to_s
            s_entropy += s_term
            t_entropy += t_term
        if GRAD:
            slope = slope_of(ys, steep, unit, outer_s > 0, GENERAL)
            grad = tl.where(dead, 0.0, _grad(p_student, a, centre, factor * slope, KIND))
            grad += tl.where(entries == token, token_part, hard * p_student) * slope
            grad = held(tl.where(finite, grad, 0.0), Grad.dtype.element_ty)
            tl.store(Grad + entries, grad, mask=mask)
    if GRAD:
        if split == 0:
            _store_nothing(Grad, vocab, student_width, BLOCK)
    if VALUE:
        Sums += split * rows + row
        field = splits.to(tl.int64) * rows
        _store_sums(Sums, field, value, centres, forward, reverse, s_entropy, t_entropy, SCORES, KIND)
