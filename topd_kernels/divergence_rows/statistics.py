"""The statistics of two tiles' rows for Triton: what a row's divergences need before its entries are looked at one by one.

`statistics` leaves a record for each part of a row, Parts; `constants` makes one of each row of them, Row (records.py).
"""

import triton
import triton.language as tl

from topd_kernels.divergence_rows.records import (
    PART_CENTRE,
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
from topd_kernels.shared.records import load_field, store_field
from topd_kernels.shared.row_math import NEAR_OFFSETS, lane_update, log1p, logits_of, merge, number, over_lanes


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
def _relative(ys, yt, other_ys, other_yt):
    """Return A - A at another entry, A = y_S - y_T; 0 where an entry has no probability on a side. As `log_ratio`: where the
    offsets are near the sides' difference is exact, where they are apart each side's own is."""
    near = tl.abs(other_ys - other_yt) <= NEAR_OFFSETS
    gap = tl.where(near, (ys - yt) - (other_ys - other_yt), (ys - other_ys) - (yt - other_yt))
    lowest = tl.minimum(tl.minimum(ys, yt), tl.minimum(other_ys, other_yt))
    return tl.where(lowest > float("-inf"), gap, 0.0)


@triton.jit(do_not_specialize=["rows", "student_biased", "teacher_biased", "block_count"])
def statistics(
    Student, student_stride, StudentBias, student_biased, student_inner: tl.float64, student_outer: tl.float64,
    Teacher, teacher_stride, TeacherBias, teacher_biased, teacher_inner: tl.float64, teacher_outer: tl.float64,
    Parts, rows, block_count, vocab, student_width, teacher_width,
    CENTRE: tl.constexpr, TAILS: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a part of a row of both tiles once; write its record of Parts."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    Student += row * student_stride
    Teacher += row * teacher_stride
    dtype = Student.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    none = tl.full([BLOCK], float("-inf"), dtype)
    zero = tl.zeros([BLOCK], dtype)
    s_top, s_mode, s_rest, t_top, t_mode, t_rest = none, lanes, zero, none, lanes, zero
    t_there, w, only_t, only_s = none, zero, lanes < 0, lanes < 0
    start = split * block_count * BLOCK
    end = tl.minimum(start + block_count * BLOCK, vocab)
    for block in range(start, end, BLOCK):
        entries = block + lanes
        ys, yt = logits_pair(Student, Teacher, StudentBias, TeacherBias, entries, entries < end, student_biased, teacher_biased,
                              student_inner, student_outer, teacher_inner, teacher_outer, GENERAL)  # fmt: skip
        no_student = ys == float("-inf")
        no_teacher = yt == float("-inf")
        only_t = only_t | (no_student & (yt > float("-inf")))
        only_s = only_s | (no_teacher & (ys > float("-inf")))
        before = s_rest
        before_top = s_top
        s_top, s_mode, s_rest, above, e = lane_update(ys, entries, s_top, s_mode, s_rest)
        t_top, t_mode, t_rest, _, _ = lane_update(yt, entries, t_top, t_mode, t_rest)
        if CENTRE:  # w: the sum over the others of exp(y_S - top) (A - A at the top)
            gap = _relative(ys, yt, before_top, t_there)
            w = tl.where(above, e * (w - gap * (before + 1)), w + e * gap)
            t_there = tl.where(above, yt, t_there)

    best, first, total, is_mode, factor = over_lanes(s_top, s_mode, s_rest)
    Parts += (split * rows + row).to(tl.int64)
    field = tl.num_programs(1).to(tl.int64) * rows
    tl.store(Parts + PART_STUDENT_TOP * field, best)
    tl.store(Parts + PART_STUDENT_MODE * field, first.to(dtype))
    tl.store(Parts + PART_STUDENT_REST * field, total)
    if CENTRE:
        t_best = tl.max(tl.where(is_mode, t_there, float("-inf")), 0)
        others = factor * (_relative(s_top, t_there, best, t_best) * (1 + s_rest) + w)
        tl.store(Parts + PART_TEACHER_AT_MODE * field, t_best)
        tl.store(Parts + PART_CENTRE * field, tl.sum(tl.where(is_mode, w, others), 0))
    best, first, total, _, _ = over_lanes(t_top, t_mode, t_rest)
    tl.store(Parts + PART_TEACHER_TOP * field, best)
    tl.store(Parts + PART_TEACHER_MODE * field, first.to(dtype))
    tl.store(Parts + PART_TEACHER_REST * field, total)
    tl.store(Parts + PART_ONLY_TEACHER * field, tl.max(only_t.to(tl.int32), 0).to(dtype))
    tl.store(Parts + PART_ONLY_STUDENT * field, tl.max(only_s.to(tl.int32), 0).to(dtype))
    if TAILS:
        if split == 0:
            top, rest = _tail(Student, StudentBias, student_biased, student_inner, student_outer, vocab, student_width,
                              GENERAL, BLOCK)  # fmt: skip
            tl.store(Parts + PART_STUDENT_TAIL_TOP * field, top)
            tl.store(Parts + PART_STUDENT_TAIL_REST * field, rest)
            top, rest = _tail(Teacher, TeacherBias, teacher_biased, teacher_inner, teacher_outer, vocab, teacher_width,
                              GENERAL, BLOCK)  # fmt: skip
            tl.store(Parts + PART_TEACHER_TAIL_TOP * field, top)
            tl.store(Parts + PART_TEACHER_TAIL_REST * field, rest)


@triton.jit
def _merged(Parts, row, mask, splits, rows, field, TOP: tl.constexpr, MODE: tl.constexpr, REST: tl.constexpr):
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
        down = _relative(other_top, other_there, top, there)
        up = _relative(top, there, other_top, other_there)
        top, merged, higher, gap = merge(top, rest, other_top, other_rest)
        below = w + gap * (other_w + down * (1 + other_rest))
        w = tl.where(higher, other_w + gap * (w + up * (1 + rest)), below)
        there = tl.where(higher, other_there, there)
        mode = tl.where(higher, other_mode, mode)
        rest = merged
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
    s_top, s_mode, s_rest, w = _merged(
        Parts, row, mask, splits, rows, field, PART_STUDENT_TOP, PART_STUDENT_MODE, PART_STUDENT_REST
    )  # fmt: skip
    t_top, t_mode, t_rest, _ = _merged(
        Parts, row, mask, splits, rows, field, PART_TEACHER_TOP, PART_TEACHER_MODE, PART_TEACHER_REST
    )  # fmt: skip
    dtype = Parts.dtype.element_ty
    only_t = tl.zeros([BLOCK], dtype)
    only_s = tl.zeros([BLOCK], dtype)
    for split in range(splits):
        Part = Parts + split * rows
        only_t = tl.maximum(only_t, load_field(Part, PART_ONLY_TEACHER, field, row, mask))
        only_s = tl.maximum(only_s, load_field(Part, PART_ONLY_STUDENT, field, row, mask))
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
    store_field(Row, ROW_FINITE, rows, row, finite.to(dtype), mask)
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
