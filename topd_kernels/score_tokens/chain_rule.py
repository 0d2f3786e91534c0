"""Divergences and entropies of a row out of groups of its vocabulary, each group read once.

A group has, of each side, its mass (largest logit `top`, sum `rest` of exp(y - top) over the others) and, under its own
normalisers, its entropies and KLs. With P(A), P(B) the shares of two groups in their union:

    KL = P(A) KL_A + P(B) KL_B + KL((P(A), P(B)) || (Q(A), Q(B)))      H = P(A) H_A + P(B) H_B + H(P(A), P(B))

No term is negative, so nothing cancels, and the order of merging does not matter. `ratio` is log(mass_T / mass_S) of a group,
carried along: between near-equal sides it is small and keeps its digits, which a difference of two log-masses does not.

Probability 0 is a logit of FLOOR: its exp is 0 beside any other and all differences stay finite. An entry that one side alone
forbids makes its KL inf there and then.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from topd_kernels.shared.row_math import expm1, kl_term, log1p, phi_pair

FLOOR = tl.constexpr(-1e30)
# Offsets of both sides nearer than this are left in: the difference of near-equal logits is exact, that of shifted ones is not.
NEAR_OFFSETS = tl.constexpr(4.0)
# A log-ratio beyond this is that of an entry which one side forbids.
FORBIDDEN = tl.constexpr(1e29)
GROUP_FLOATS = tl.constexpr(11)


class Side(NamedTuple):
    """One model's part of a group: blocks of one element a row."""

    top: Any
    rest: Any
    mode: Any  # the largest logit's entry, the first of equals
    entropy: Any


class Group(NamedTuple):
    student: Side
    teacher: Side
    ratio: Any
    forward: Any
    reverse: Any


@triton.jit
def empty_side(rows: tl.constexpr):
    none = tl.full((rows,), FLOOR, tl.float32)
    zero = tl.zeros((rows,), tl.float32)
    return Side(none, zero, tl.zeros((rows,), tl.int32), zero)


@triton.jit
def empty_group(rows: tl.constexpr):
    zero = tl.zeros((rows,), tl.float32)
    return Group(empty_side(rows), empty_side(rows), zero, zero, zero)


@triton.jit
def side_of(y, entry):
    """Logits [BM, BN] of the entries [BN], ascending, FLOOR where there is none: one side's part of their group."""
    top = tl.max(y, 1)
    mode = tl.min(tl.where(y == top[:, None], entry[None, :], 2147483647), 1)
    shifted = y - top[:, None]
    e = tl.exp(shifted)
    rest = tl.sum(tl.where(entry[None, :] == mode[:, None], 0.0, e), 1)
    return Side(top, rest, mode, log1p(rest) - tl.sum(e * shifted, 1) / (1 + rest))


@triton.jit
def log_mass_ratio(rest, over_rest):
    """log((1 + rest) / (1 + over_rest)), with the digits of a small one."""
    x = (rest - over_rest) / (1 + over_rest)
    return tl.where(tl.abs(x) <= 0.5, log1p(x), log1p(rest) - log1p(over_rest))


@triton.jit
def group_of(s, t, student, teacher):
    """Logits [BM, BN] and what `side_of` made of them, as a group. The probabilities are formed anew: registers are scarcer."""
    shift = teacher.top - student.top
    near = tl.abs(shift) <= NEAR_OFFSETS
    rests = log_mass_ratio(teacher.rest, student.rest)
    shifted_t = t - tl.where(near, 0.0, teacher.top)[:, None]
    shifted_s = s - tl.where(near, 0.0, student.top)[:, None]
    d = ((shifted_t - shifted_s) - tl.where(near, shift, 0.0)[:, None]) - rests[:, None]
    p = tl.exp((t - teacher.top[:, None]) - log1p(teacher.rest)[:, None])
    q = tl.exp((s - student.top[:, None]) - log1p(student.rest)[:, None])
    phi, phi_back = phi_pair(d)
    close = tl.abs(d) <= 1
    forward = tl.sum(tl.where(d > FORBIDDEN, float("inf"), kl_term(p, q, d, close, phi)), 1)
    reverse = tl.sum(tl.where(d < -FORBIDDEN, float("inf"), kl_term(q, p, -d, close, phi_back)), 1)
    forward = tl.where(shift > FORBIDDEN, float("inf"), tl.where(teacher.top == FLOOR, 0.0, forward))
    reverse = tl.where(shift < -FORBIDDEN, float("inf"), tl.where(student.top == FLOOR, 0.0, reverse))
    return Group(student, teacher, shift + rests, forward, reverse)


@triton.jit
def _shares(delta):
    """Of groups A and B with log(mass_B / mass_A) = delta: their shares of the union, and the shares' negative logarithms."""
    e = tl.exp(-tl.abs(delta))
    soft = log1p(e)
    smaller = e / (1 + e)
    larger = 1 / (1 + e)
    up = delta > 0
    return (
        tl.where(up, smaller, larger),
        tl.where(up, larger, smaller),
        tl.where(up, delta, 0.0) + soft,
        tl.where(up, 0.0, -delta) + soft,
    )


@triton.jit
def log_mass_step(top, rest, other_top, other_rest):
    """log(the other's mass / this mass)."""
    return (other_top - top) + (log1p(other_rest) - log1p(rest))


@triton.jit
def merge_masses(top, rest, other_top, other_rest):
    """The union's top and rest, and whether the other's top is larger."""
    higher = other_top > top
    upper = tl.where(higher, other_top, top)
    gap = tl.exp(tl.where(higher, top, other_top) - upper)
    return upper, tl.where(higher, other_rest + gap * (1 + rest), rest + gap * (1 + other_rest)), higher


@triton.jit
def _merge_sides(a, b, share_a, share_b, cost_a, cost_b):
    top, rest, higher = merge_masses(a.top, a.rest, b.top, b.rest)
    entropy = share_a * a.entropy + share_b * b.entropy + (share_a * cost_a + share_b * cost_b)
    return Side(top, rest, tl.where(higher, b.mode, a.mode), entropy)


@triton.jit
def _weighted(share, value):
    """share * value; an infinite value's share is not 0, though it may have underflowed."""
    return tl.where(value == float("inf"), value, share * value)


@triton.jit
def merge(a, b):
    """Two groups to one; b's entries lie above a's."""
    s_step = log_mass_step(a.student.top, a.student.rest, b.student.top, b.student.rest)
    t_step = log_mass_step(a.teacher.top, a.teacher.rest, b.teacher.top, b.teacher.rest)
    q_a, q_b, s_cost_a, s_cost_b = _shares(s_step)
    p_a, p_b, t_cost_a, t_cost_b = _shares(t_step)

    # log(P / Q) of both groups; from the change of ratio where that is small: P(A) / Q(A) = 1 / (1 + Q(B) expm1(change)).
    near = (tl.abs(a.ratio) <= NEAR_OFFSETS) & (tl.abs(b.ratio) <= NEAR_OFFSETS)
    change = tl.where(near, b.ratio - a.ratio, t_step - s_step)
    small = tl.abs(change) <= 0.5
    growth = log1p(q_b * expm1(tl.where(small, change, 0.0)))
    d_a = tl.where(small, -growth, s_cost_a - t_cost_a)
    d_b = tl.where(small, change - growth, s_cost_b - t_cost_b)
    phi_a, back_a = phi_pair(d_a)
    phi_b, back_b = phi_pair(d_b)
    close_a = tl.abs(d_a) <= 1
    close_b = tl.abs(d_b) <= 1
    forward = kl_term(p_a, q_a, d_a, close_a, phi_a) + kl_term(p_b, q_b, d_b, close_b, phi_b)
    reverse = kl_term(q_a, p_a, -d_a, close_a, back_a) + kl_term(q_b, p_b, -d_b, close_b, back_b)

    student = _merge_sides(a.student, b.student, q_a, q_b, s_cost_a, s_cost_b)
    teacher = _merge_sides(a.teacher, b.teacher, p_a, p_b, t_cost_a, t_cost_b)
    whole = (teacher.top - student.top) + log_mass_ratio(teacher.rest, student.rest)
    return Group(
        student,
        teacher,
        tl.where(small & near, a.ratio + growth, whole),
        _weighted(p_a, a.forward) + _weighted(p_b, b.forward) + forward,
        _weighted(q_a, a.reverse) + _weighted(q_b, b.reverse) + reverse,
    )


@triton.jit
def store_group(At, group, rows, inside):
    """Into At + i rows, i < GROUP_FLOATS."""
    s = group.student
    t = group.teacher
    values = (
        s.top, s.rest, s.mode.to(tl.float32, bitcast=True), s.entropy,
        t.top, t.rest, t.mode.to(tl.float32, bitcast=True), t.entropy,
        group.ratio, group.forward, group.reverse,
    )  # fmt: skip
    for i in tl.static_range(GROUP_FLOATS):
        tl.store(At + i * rows, values[i], mask=inside)


@triton.jit
def _load_side(At, rows, inside):
    top = tl.load(At, mask=inside, other=FLOOR)
    rest = tl.load(At + rows, mask=inside, other=0.0)
    mode = tl.load(At + 2 * rows, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return Side(top, rest, mode, tl.load(At + 3 * rows, mask=inside, other=0.0))


@triton.jit
def load_group(At, rows, inside):
    """As `store_group` left it; an empty one outside."""
    student = _load_side(At, rows, inside)
    teacher = _load_side(At + 4 * rows, rows, inside)
    ratio = tl.load(At + 8 * rows, mask=inside, other=0.0)
    forward = tl.load(At + 9 * rows, mask=inside, other=0.0)
    return Group(student, teacher, ratio, forward, tl.load(At + 10 * rows, mask=inside, other=0.0))
