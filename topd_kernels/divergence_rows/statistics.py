"""The statistics of two tiles' rows for Triton: what a row's divergences need before its entries are looked at one by one.

Parts [14, splits, rows]: student top, mode, rest; teacher's; whether an entry has probability on the teacher's side only, on
the student's only; the teacher's logit at the student's mode and the sum of exp(y_S - top) (A - A at the mode), A = y_S - y_T;
top and rest beyond the common vocabulary, of the student, of the teacher.
Row [16, rows]: student top, mode, log1p(rest), 1 / (1 + rest); teacher's; whether both distributions exist; the two flags; E of
the reverse KL relative to A at the mode; log p of the token on both sides; lost mass on both sides.
"""

import triton
import triton.language as tl

from topd_kernels.shared.row_math import lane_update, log1p, logits_of, merge, number, over_lanes

PARTS, ROW = 14, 16


@triton.jit
def logits_pair(
    Student, Teacher, StudentBias, TeacherBias, at, mask, biases,
    student_inner, student_outer, teacher_inner, teacher_outer, GENERAL: tl.constexpr,
):  # fmt: skip
    """Both sides' logits at the entries `at`; Student and Teacher point at the row."""
    ys = tl.load(Student + at, mask=mask, other=0.0)
    yt = tl.load(Teacher + at, mask=mask, other=0.0)
    dtype = ys.dtype
    outer_s = number(student_outer, dtype)
    outer_t = number(teacher_outer, dtype)
    ys = logits_of(ys, StudentBias, at, mask, (biases & 1) != 0, number(student_inner, dtype), outer_s, outer_s > 0, GENERAL)
    yt = logits_of(yt, TeacherBias, at, mask, (biases & 2) != 0, number(teacher_inner, dtype), outer_t, outer_t > 0, GENERAL)
    return ys, yt


@triton.jit
def _tail(Product, Bias, biased, inner, outer, start, end, GENERAL: tl.constexpr, BLOCK: tl.constexpr):
    """Largest entry and the sum over the others of [start, end)."""
    dtype = Product.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), dtype)
    index = lanes
    rest = tl.zeros([BLOCK], dtype)
    for block in range(start, end, BLOCK):
        at = block + lanes
        y = tl.load(Product + at, mask=at < end, other=0.0)
        cap = number(outer, dtype)
        y = logits_of(y, Bias, at, at < end, biased, number(inner, dtype), cap, cap > 0, GENERAL)
        top, index, rest, _, _ = lane_update(y, at, top, index, rest)
    best, _, total, _, _ = over_lanes(top, index, rest)
    return best, total


@triton.jit
def _relative(ys, yt, ys_at, yt_at):
    """A - A at another entry, A = y_S - y_T; 0 where an entry has no probability on a side. As `log_ratio`: where the offsets
    are near the sides' difference is exact, where they are apart each side's own is."""
    near = tl.abs(ys_at - yt_at) <= 4
    gap = tl.where(near, (ys - yt) - (ys_at - yt_at), (ys - ys_at) - (yt - yt_at))
    lowest = tl.minimum(tl.minimum(ys, yt), tl.minimum(ys_at, yt_at))
    return tl.where(lowest > float("-inf"), gap, 0.0)


@triton.jit(do_not_specialize=["rows", "biases", "block_count"])
def statistics(
    Student, Teacher, student_stride, teacher_stride, StudentBias, TeacherBias, biases, Parts, rows, block_count,
    vocab, student_width, teacher_width,
    student_inner: tl.float64, student_outer: tl.float64, teacher_inner: tl.float64, teacher_outer: tl.float64,
    CENTRE: tl.constexpr, TAILS: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    Student += row * student_stride
    Teacher += row * teacher_stride
    dtype = Student.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    none = tl.full([BLOCK], float("-inf"), dtype)
    zero = tl.zeros([BLOCK], dtype)
    s_top, s_at, s_rest, t_top, t_at, t_rest = none, lanes, zero, none, lanes, zero
    t_there, w, only_t, only_s = none, zero, lanes < 0, lanes < 0
    start = split * block_count * BLOCK
    end = tl.minimum(start + block_count * BLOCK, vocab)
    for block in range(start, end, BLOCK):
        at = block + lanes
        ys, yt = logits_pair(Student, Teacher, StudentBias, TeacherBias, at, at < end, biases,
                              student_inner, student_outer, teacher_inner, teacher_outer, GENERAL)  # fmt: skip
        no_student = ys == float("-inf")
        no_teacher = yt == float("-inf")
        only_t = only_t | (no_student & (yt > float("-inf")))
        only_s = only_s | (no_teacher & (ys > float("-inf")))
        before = s_rest
        before_top = s_top
        s_top, s_at, s_rest, above, e = lane_update(ys, at, s_top, s_at, s_rest)
        t_top, t_at, t_rest, _, _ = lane_update(yt, at, t_top, t_at, t_rest)
        if CENTRE:  # w: the sum over the others of exp(y_S - top) (A - A at the top)
            gap = _relative(ys, yt, before_top, t_there)
            w = tl.where(above, e * (w - gap * (before + 1)), w + e * gap)
            t_there = tl.where(above, yt, t_there)

    best, first, total, is_mode, factor = over_lanes(s_top, s_at, s_rest)
    Parts += (split * rows + row).to(tl.int64)
    field = tl.num_programs(1).to(tl.int64) * rows
    tl.store(Parts, best)
    tl.store(Parts + field, first.to(dtype))
    tl.store(Parts + 2 * field, total)
    if CENTRE:
        t_best = tl.max(tl.where(is_mode, t_there, float("-inf")), 0)
        others = factor * (_relative(s_top, t_there, best, t_best) * (1 + s_rest) + w)
        tl.store(Parts + 8 * field, t_best)
        tl.store(Parts + 9 * field, tl.sum(tl.where(is_mode, w, others), 0))
    best, first, total, _, _ = over_lanes(t_top, t_at, t_rest)
    tl.store(Parts + 3 * field, best)
    tl.store(Parts + 4 * field, first.to(dtype))
    tl.store(Parts + 5 * field, total)
    tl.store(Parts + 6 * field, tl.max(only_t.to(tl.int32), 0).to(dtype))
    tl.store(Parts + 7 * field, tl.max(only_s.to(tl.int32), 0).to(dtype))
    if TAILS:
        if split == 0:
            top, rest = _tail(Student, StudentBias, (biases & 1) != 0, student_inner, student_outer, vocab, student_width,
                              GENERAL, BLOCK)  # fmt: skip
            tl.store(Parts + 10 * field, top)
            tl.store(Parts + 11 * field, rest)
            top, rest = _tail(Teacher, TeacherBias, (biases & 2) != 0, teacher_inner, teacher_outer, vocab, teacher_width,
                              GENERAL, BLOCK)  # fmt: skip
            tl.store(Parts + 12 * field, top)
            tl.store(Parts + 13 * field, rest)


@triton.jit
def _merged(Parts, at, mask, splits, rows, field, FIRST: tl.constexpr):
    """The S parts of one side's statistics: top, mode, rest; and of E's sum, with the teacher's logit at the top."""
    top = tl.load(Parts + FIRST * field + at, mask=mask, other=0.0)
    mode = tl.load(Parts + (FIRST + 1) * field + at, mask=mask, other=0.0)
    rest = tl.load(Parts + (FIRST + 2) * field + at, mask=mask, other=0.0)
    there = tl.load(Parts + 8 * field + at, mask=mask, other=0.0)
    w = tl.load(Parts + 9 * field + at, mask=mask, other=0.0)
    for split in range(1, splits):
        Part = Parts + split * rows + at
        other_top = tl.load(Part + FIRST * field, mask=mask, other=0.0)
        other_mode = tl.load(Part + (FIRST + 1) * field, mask=mask, other=0.0)
        other_rest = tl.load(Part + (FIRST + 2) * field, mask=mask, other=0.0)
        other_there = tl.load(Part + 8 * field, mask=mask, other=0.0)
        other_w = tl.load(Part + 9 * field, mask=mask, other=0.0)
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
    """log p(token); -inf for one outside the vocabulary."""
    inside = mask & (token >= 0) & (token < vocab)
    y = tl.load(Product + row * stride + token, mask=inside, other=0.0)
    cap = number(outer, y.dtype)
    y = logits_of(y, Bias, token, inside, biased, number(inner, y.dtype), cap, cap > 0, GENERAL)
    return tl.where(inside, (y - top) - log_rest, float("-inf"))


@triton.jit
def _lost(Parts, at, mask, field, top, log_rest, FIRST: tl.constexpr):
    """The mass beyond the common vocabulary as a share of all."""
    tail_top = tl.load(Parts + FIRST * field + at, mask=mask, other=0.0)
    tail_rest = tl.load(Parts + (FIRST + 1) * field + at, mask=mask, other=0.0)
    gap = (tail_top - top) + (log1p(tail_rest) - log_rest)
    return tl.where(tail_top == float("-inf"), 0.0, 1 / (1 + tl.exp(-gap)))


@triton.jit(do_not_specialize=["rows", "splits", "biases", "has_tokens"], do_not_specialize_on_alignment=["Tokens"])
def constants(
    Student, Teacher, student_stride, teacher_stride, StudentBias, TeacherBias, biases, Parts, Row, Tokens, has_tokens, rows,
    splits, vocab, student_inner: tl.float64, student_outer: tl.float64, teacher_inner: tl.float64, teacher_outer: tl.float64,
    TAILS: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows
    at = at.to(tl.int64)
    field = splits.to(tl.int64) * rows
    s_top, s_mode, s_rest, w = _merged(Parts, at, mask, splits, rows, field, 0)
    t_top, t_mode, t_rest, _ = _merged(Parts, at, mask, splits, rows, field, 3)
    dtype = Parts.dtype.element_ty
    only_t = tl.zeros([BLOCK], dtype)
    only_s = tl.zeros([BLOCK], dtype)
    for split in range(splits):
        only_t = tl.maximum(only_t, tl.load(Parts + 6 * field + split * rows + at, mask=mask, other=0.0))
        only_s = tl.maximum(only_s, tl.load(Parts + 7 * field + split * rows + at, mask=mask, other=0.0))
    s_log = log1p(s_rest)
    t_log = log1p(t_rest)
    infinity = float("inf")
    finite = (tl.abs(s_top) < infinity) & (tl.abs(t_top) < infinity) & (s_rest < infinity) & (t_rest < infinity)
    tl.store(Row + at, s_top, mask=mask)
    tl.store(Row + rows + at, s_mode, mask=mask)
    tl.store(Row + 2 * rows + at, s_log, mask=mask)
    tl.store(Row + 3 * rows + at, 1 / (1 + s_rest), mask=mask)
    tl.store(Row + 4 * rows + at, t_top, mask=mask)
    tl.store(Row + 5 * rows + at, t_mode, mask=mask)
    tl.store(Row + 6 * rows + at, t_log, mask=mask)
    tl.store(Row + 7 * rows + at, 1 / (1 + t_rest), mask=mask)
    tl.store(Row + 8 * rows + at, finite.to(dtype), mask=mask)
    tl.store(Row + 9 * rows + at, only_t.to(dtype), mask=mask)
    tl.store(Row + 10 * rows + at, only_s.to(dtype), mask=mask)
    tl.store(Row + 11 * rows + at, w / (1 + s_rest), mask=mask)
    if has_tokens != 0:
        token = tl.load(Tokens + at, mask=mask, other=0)
        found = _token_logprob(Student, student_stride, StudentBias, (biases & 1) != 0, at, token, vocab, mask,
                               student_inner, student_outer, s_top, s_log, GENERAL)  # fmt: skip
        tl.store(Row + 12 * rows + at, found, mask=mask)
        found = _token_logprob(Teacher, teacher_stride, TeacherBias, (biases & 2) != 0, at, token, vocab, mask,
                               teacher_inner, teacher_outer, t_top, t_log, GENERAL)  # fmt: skip
        tl.store(Row + 13 * rows + at, found, mask=mask)
    if TAILS:
        tl.store(Row + 14 * rows + at, _lost(Parts, at, mask, field, s_top, s_log, 10), mask=mask)
        tl.store(Row + 15 * rows + at, _lost(Parts, at, mask, field, t_top, t_log, 12), mask=mask)
