"""The statistics of a row's full blocks, which need no mask, while every logit is finite.

A program knows the largest entry so far of each side, its mode: a number, not one for each lane. What is summed is relative to
it, so an entry costs an exponential and an addition. Each block is asked whether any of its entries rises above; only then, a
few times a row, the mode is found again, the sums are moved to it, and the block is added up anew.
"""

import triton
import triton.language as tl

from topd_kernels.shared.logits import unmasked_logits
from topd_kernels.shared.row_math import NEAR_OFFSETS, exp
from topd_kernels.shared.tops import LANE_ENTRIES, lead, merge


@triton.jit
def relative(ys, yt, other_ys, other_yt):
    """Return A - A at another entry, A = y_S - y_T; 0 where an entry has no probability on a side. As `log_ratio`: where the
    offsets are near the sides' difference is exact, where they are apart each side's own is."""
    near = tl.abs(other_ys - other_yt) <= NEAR_OFFSETS
    gap = tl.where(near, (ys - yt) - (other_ys - other_yt), (ys - other_ys) - (yt - other_yt))
    lowest = tl.minimum(tl.minimum(ys, yt), tl.minimum(other_ys, other_yt))
    return tl.where(lowest > float("-inf"), gap, 0.0)


@triton.jit
def merged(top, mode, rest, there, w, other_top, other_mode, other_rest, other_there, other_w):
    """Merge two parts of a row, the first of equals first: return top, mode, rest, the other side's logit there, and E's sum,
    which goes by it (and means something on the student's side alone)."""
    down = relative(other_top, other_there, top, there)
    up = relative(top, there, other_top, other_there)
    upper, together, higher, gap = merge(top, rest, other_top, other_rest)
    below = w + gap * (other_w + down * (1 + other_rest))
    w = tl.where(higher, other_w + gap * (w + up * (1 + rest)), below)
    return upper, tl.where(higher, other_mode, mode), together, tl.where(higher, other_there, there), w


@triton.jit
def rises(ys, yt, s_top, t_top):
    """Tell whether an entry of a block is above its side's largest."""
    above = (tl.max(ys, 0) > s_top) | (tl.max(yt, 0) > t_top)
    return tl.max(above.to(tl.int32), 0) != 0


@triton.jit
def offsets(s_top, there):
    """Return what A is made of, A - A at the student's mode = ((y_S - first) - (y_T - second)) - third, as `relative` does."""
    near = tl.abs(s_top - there) <= NEAR_OFFSETS
    return tl.where(near, 0.0, s_top), tl.where(near, 0.0, there), tl.where(near, s_top - there, 0.0)


@triton.jit
def _summed(s_rest, t_rest, w, ys, yt, es, et, first, second, third, CENTRE: tl.constexpr):
    """Add a block to the sums over the others and to E's. Without E its place watches over the logits: it stays finite only
    where all of them are."""
    if CENTRE:
        w += tl.sum(es * (((ys - first) - (yt - second)) - third), 0)
    else:
        w += tl.sum(ys * yt, 0)
    return s_rest + tl.sum(es, 0), t_rest + tl.sum(et, 0), w


@triton.jit
def leading_blocks(
    Student, Teacher, StudentBias, TeacherBias, student_biased, teacher_biased, inner_s, outer_s, inner_t, outer_t, start, end,
    CENTRE: tl.constexpr, GENERAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the statistics of the entries [start, end), whole blocks: top, mode and rest of the student, the same of the
    teacher, the teacher's logit at the student's mode, and E's sum; last, whether they hold, which needs finite logits."""
    dtype = Student.dtype.element_ty
    LANES: tl.constexpr = BLOCK // LANE_ENTRIES
    offset = tl.arange(0, LANE_ENTRIES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    s_top = tl.full([], float("-inf"), dtype)
    s_mode = start * 0
    s_rest = tl.zeros([LANES], dtype)
    t_top, t_mode, t_rest, there, w = s_top, s_mode, s_rest, s_top, s_rest
    block = start
    while block < end:
        entries = block + offset
        ys = unmasked_logits(tl.load(Student + entries), StudentBias, entries, student_biased, inner_s, outer_s, GENERAL)
        yt = unmasked_logits(tl.load(Teacher + entries), TeacherBias, entries, teacher_biased, inner_t, outer_t, GENERAL)
        before, before_there, before_rest = s_top, there, s_rest
        s_top, s_mode, s_rest, above, factor = lead(ys, entries, s_top, s_mode, s_rest)
        t_top, t_mode, t_rest, _, _ = lead(yt, entries, t_top, t_mode, t_rest)
        if CENTRE:
            there = tl.where(above, tl.sum(tl.sum(tl.where(entries == s_mode, yt, 0.0), 0), 0), there)
            gap = tl.where(above, relative(before, before_there, s_top, there), 0.0)
            alone = tl.where(tl.arange(0, LANES) == 0, factor * gap, 0.0)
            w = factor * (w + gap * before_rest) + alone
        first, second, third = offsets(s_top, there)
        es = tl.where(entries == s_mode, 0.0, exp(ys - s_top))
        et = tl.where(entries == t_mode, 0.0, exp(yt - t_top))
        s_rest, t_rest, w = _summed(s_rest, t_rest, w, ys, yt, es, et, first, second, third, CENTRE)
        block += BLOCK
        calm = block < end
        while calm:  # until a block rises
            entries = block + offset
            ys = unmasked_logits(tl.load(Student + entries), StudentBias, entries, student_biased, inner_s, outer_s, GENERAL)
            yt = unmasked_logits(tl.load(Teacher + entries), TeacherBias, entries, teacher_biased, inner_t, outer_t, GENERAL)
            es = exp(ys - s_top)
            et = exp(yt - t_top)
            # Added up beside the question, and only kept where the block does not rise: nothing waits for the answer.
            s_with, t_with, w_with = _summed(s_rest, t_rest, w, ys, yt, es, et, first, second, third, CENTRE)
            calm = not rises(ys, yt, s_top, t_top)
            s_rest, t_rest, w = tl.where(calm, s_with, s_rest), tl.where(calm, t_with, t_rest), tl.where(calm, w_with, w)
            block = tl.where(calm, block + BLOCK, block)
            calm = calm & (block < end)
    s_total, t_total, centre = tl.sum(s_rest, 0), tl.sum(t_rest, 0), tl.sum(w, 0)
    holds = (tl.abs(centre) < float("inf")) & (s_total < float("inf")) & (t_total < float("inf"))
    return s_top, s_mode, s_total, t_top, t_mode, t_total, there, centre, holds
