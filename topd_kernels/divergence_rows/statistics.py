"""The statistics of two tiles' rows for Triton: what a row's divergences need before its entries are looked at one by one.

`statistics` leaves a record for each part of a row, Parts; `constants` (constants.py) makes one of each row of them.
"""

import triton
import triton.language as tl

from topd_kernels.divergence_rows.leading import leading_blocks, merged, relative
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
)
from topd_kernels.shared.logits import logits_of
from topd_kernels.shared.row_math import number
from topd_kernels.shared.tops import LANE_ENTRIES, lane_update, over_lanes


@triton.jit
def logits_pair(
    Student, Teacher, StudentBias, TeacherBias, entries, mask, student_biased, teacher_biased,
    student_inner, student_outer, teacher_inner, teacher_outer, GENERAL: tl.constexpr,
):  # fmt: skip
    """Return both sides' logits at the entries; Student and Teacher point at the row."""
    ys = tl.load(Student + entries, mask=mask, other=0.0)
    yt = tl.load(Teacher + entries, mask=mask, other=0.0)
    dtype = ys.dtype
    outer_s = number(student_outer, dtype)
    outer_t = number(teacher_outer, dtype)
    inner_s = number(student_inner, dtype)
    inner_t = number(teacher_inner, dtype)
    ys = logits_of(ys, StudentBias, entries, mask, student_biased != 0, inner_s, outer_s, outer_s > 0, GENERAL)
    yt = logits_of(yt, TeacherBias, entries, mask, teacher_biased != 0, inner_t, outer_t, outer_t > 0, GENERAL)
    return ys, yt


@triton.jit
def _tail(Product, Bias, biased, inner, outer, start, end, GENERAL: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest of the entries [start, end) and the sum over the others."""
    dtype = Product.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), dtype)
    index = lanes
    rest = tl.zeros([BLOCK], dtype)
    for block in range(start, end, BLOCK):
        entries = block + lanes
        mask = entries < end
        y = tl.load(Product + entries, mask=mask, other=0.0)
        cap = number(outer, dtype)
        y = logits_of(y, Bias, entries, mask, biased != 0, number(inner, dtype), cap, cap > 0, GENERAL)
        top, index, rest, _, _ = lane_update(y, entries, top, index, rest)
    best, _, total, _, _ = over_lanes(top, index, rest)
    return best, total


@triton.jit
def _careful(
    Student, Teacher, StudentBias, TeacherBias, student_biased, teacher_biased,
    student_inner, student_outer, teacher_inner, teacher_outer, start, end,
    CENTRE: tl.constexpr, GENERAL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Return the statistics of the entries [start, end), whatever they are: top, mode and rest of the student, the same of the
    teacher, the teacher's logit at the student's mode, E's sum, and whether an entry has probability on the teacher's side
    only, on the student's only, on both sides everywhere."""
    dtype = Student.dtype.element_ty
    lanes = tl.arange(0, LANES)
    none = tl.full([LANES], float("-inf"), dtype)
    zero = tl.zeros([LANES], dtype)
    s_top, s_mode, s_rest, t_top, t_mode, t_rest = none, lanes, zero, none, lanes, zero
    t_there, w, only_t, only_s, missing = none, zero, lanes * 0, lanes * 0, lanes * 0
    for block in range(start, end, LANES):
        entries = block + lanes
        mask = entries < end
        ys, yt = logits_pair(Student, Teacher, StudentBias, TeacherBias, entries, mask, student_biased, teacher_biased,
                              student_inner, student_outer, teacher_inner, teacher_outer, GENERAL)  # fmt: skip
        no_student = ys == float("-inf")
        no_teacher = yt == float("-inf")
        # Numbers, not bools: a loop that carries those needs more predicates than there are.
        only_t = tl.where(no_student & (yt > float("-inf")), 1, only_t)
        only_s = tl.where(no_teacher & (ys > float("-inf")), 1, only_s)
        missing = tl.where((no_student | no_teacher) & mask, 1, missing)
        before = s_rest
        before_top = s_top
        s_top, s_mode, s_rest, above, e = lane_update(ys, entries, s_top, s_mode, s_rest)
        t_top, t_mode, t_rest, _, _ = lane_update(yt, entries, t_top, t_mode, t_rest)
        if CENTRE:  # w: the sum over the others of exp(y_S - top) (A - A at the top)
            gap = relative(ys, yt, before_top, t_there)
            w = tl.where(above, e * (w - gap * (before + 1)), w + e * gap)
            t_there = tl.where(above, yt, t_there)
    best, first, total, is_mode, factor = over_lanes(s_top, s_mode, s_rest)
    t_best = tl.max(tl.where(is_mode, t_there, float("-inf")), 0)
    others = factor * (relative(s_top, t_there, best, t_best) * (1 + s_rest) + w)
    centre = tl.sum(tl.where(is_mode, w, others), 0)
    teacher_best, teacher_first, teacher_total, _, _ = over_lanes(t_top, t_mode, t_rest)
    only_t = tl.max(only_t, 0)
    only_s = tl.max(only_s, 0)
    finite = 1 - tl.max(missing, 0)
    return best, first, total, teacher_best, teacher_first, teacher_total, t_best, centre, only_t, only_s, finite


@triton.jit(do_not_specialize=["rows", "student_biased", "teacher_biased", "block_count"])
def statistics(
    Student, student_stride, StudentBias, student_biased, student_inner: tl.float64, student_outer: tl.float64,
    Teacher, teacher_stride, TeacherBias, teacher_biased, teacher_inner: tl.float64, teacher_outer: tl.float64,
    Parts, rows, block_count, vocab, student_width, teacher_width,
    CENTRE: tl.constexpr, TAILS: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a part of a row of both tiles once; write its record of Parts. A part whose logits are not all finite is read again,
    with more care."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    Student += row * student_stride
    Teacher += row * teacher_stride
    dtype = Student.dtype.element_ty
    none = float("-inf")
    start = split * block_count * BLOCK
    end = tl.minimum(start + block_count * BLOCK, vocab)
    last = start + tl.maximum(end - start, 0) // BLOCK * BLOCK
    s_top, s_mode, s_rest, t_top, t_mode, t_rest, there, w, holds = leading_blocks(
        Student, Teacher, StudentBias, TeacherBias, student_biased, teacher_biased, number(student_inner, dtype),
        number(student_outer, dtype), number(teacher_inner, dtype), number(teacher_outer, dtype), start, last,
        CENTRE, GENERAL, BLOCK,
    )  # fmt: skip
    last = tl.where(holds, last, start)
    s_top, t_top, there = tl.where(holds, s_top, none), tl.where(holds, t_top, none), tl.where(holds, there, none)
    s_rest, t_rest, w = tl.where(holds, s_rest, 0.0), tl.where(holds, t_rest, 0.0), tl.where(holds, w, 0.0)
    s_last, s_last_mode, s_last_rest, t_last, t_last_mode, t_last_rest, last_there, last_w, only_t, only_s, finite = _careful(
        Student, Teacher, StudentBias, TeacherBias, student_biased, teacher_biased, student_inner, student_outer,
        teacher_inner, teacher_outer, last, end, CENTRE, GENERAL, BLOCK // LANE_ENTRIES,
    )  # fmt: skip
    s_top, s_mode, s_rest, there, w = merged(
        s_top, s_mode, s_rest, there, w, s_last, s_last_mode, s_last_rest, last_there, last_w
    )
    t_top, t_mode, t_rest, _, _ = merged(t_top, t_mode, t_rest, t_top, w, t_last, t_last_mode, t_last_rest, t_last, last_w)
    Parts += (split * rows + row).to(tl.int64)
    field = tl.num_programs(1).to(tl.int64) * rows
    tl.store(Parts + PART_STUDENT_TOP * field, s_top)
    tl.store(Parts + PART_STUDENT_MODE * field, s_mode.to(dtype))
    tl.store(Parts + PART_STUDENT_REST * field, s_rest)
    if CENTRE:
        tl.store(Parts + PART_TEACHER_AT_MODE * field, there)
        tl.store(Parts + PART_CENTRE * field, w)
    tl.store(Parts + PART_TEACHER_TOP * field, t_top)
    tl.store(Parts + PART_TEACHER_MODE * field, t_mode.to(dtype))
    tl.store(Parts + PART_TEACHER_REST * field, t_rest)
    tl.store(Parts + PART_ONLY_TEACHER * field, only_t.to(dtype))
    tl.store(Parts + PART_ONLY_STUDENT * field, only_s.to(dtype))
    tl.store(Parts + PART_FINITE * field, finite.to(dtype))
    if TAILS:
        if split == 0:
            top, rest = _tail(Student, StudentBias, student_biased, student_inner, student_outer, vocab, student_width,
                              GENERAL, BLOCK // LANE_ENTRIES)  # fmt: skip
            tl.store(Parts + PART_STUDENT_TAIL_TOP * field, top)
            tl.store(Parts + PART_STUDENT_TAIL_REST * field, rest)
            top, rest = _tail(Teacher, TeacherBias, teacher_biased, teacher_inner, teacher_outer, vocab, teacher_width,
                              GENERAL, BLOCK // LANE_ENTRIES)  # fmt: skip
            tl.store(Parts + PART_TEACHER_TAIL_TOP * field, top)
            tl.store(Parts + PART_TEACHER_TAIL_REST * field, rest)
