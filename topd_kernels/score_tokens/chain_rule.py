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

from topd_kernels.score_tokens.records import (
    SIDE_ENTROPY,
    SIDE_MODE,
    SIDE_REST,
    SIDE_TOP,
    STATE_FORWARD,
    STATE_RATIO,
    STATE_REVERSE,
    STATE_STUDENT,
    STATE_TEACHER,
)
from topd_kernels.shared.row_math import FLOOR, FORBIDDEN, NEAR_OFFSETS, expm1, kl_term, log1p, phi_pair
from topd_kernels.shared.tops import NO_ENTRY


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
    """Return a side without entries."""
    none = tl.full((rows,), FLOOR, tl.float32)
    zero = tl.zeros((rows,), tl.float32)
    return Side(none, zero, tl.zeros((rows,), tl.int32), zero)


@triton.jit
def empty_group(rows: tl.constexpr):
    """Return a group without entries, which merging leaves out."""
    zero = tl.zeros((rows,), tl.float32)
    return Group(empty_side(rows), empty_side(rows), zero, zero, zero)


@triton.jit
def side_of(y, entry):
    """Return one side's part of a group, from its logits [BM, BN] of the entries [BN], ascending; FLOOR where there is none."""
    top = tl.max(y, 1)
    mode = tl.min(tl.where(y == top[:, None], entry[None, :], NO_ENTRY), 1)
    shifted = y - top[:, None]
    e = tl.exp(shifted)
    rest = tl.sum(tl.where(entry[None, :] == mode[:, None], 0.0, e), 1)
    return Side(top, rest, mode, log1p(rest) - tl.sum(e * shifted, 1) / (1 + rest))


@triton.jit
def log_mass_ratio(rest, over_rest):
    """Return log((1 + rest) / (1 + over_rest)), with the digits of a small one."""
    x = (rest - over_rest) / (1 + over_rest)
    return tl.where(tl.abs(x) <= 0.5, log1p(x), log1p(rest) - log1p(over_rest))


@triton.jit
def group_of(s, t, student, teacher):
    """Return a group, from both sides' logits [BM, BN] and what `side_of` returned. The probabilities are formed anew:
    registers are scarcer."""
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
    """Return the shares of groups A and B in their union, where log(mass_B / mass_A) = delta, and the shares' negative
    logarithms."""
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
    """Return log(the other's mass / this mass)."""
    return (other_top - top) + (log1p(other_rest) - log1p(rest))


@triton.jit
def merge_masses(top, rest, other_top, other_rest):
    """Return the union's top and rest, and whether the other's top is larger."""
    higher = other_top > top
    upper = tl.where(higher, other_top, top)
    gap = tl.exp(tl.where(higher, top, other_top) - upper)
    return upper, tl.where(higher, other_rest + gap * (1 + rest), rest + gap * (1 + other_rest)), higher


@triton.jit
def _merge_sides(a, b, share_a, share_b, cost_a, cost_b):
    """Merge one side of two groups: cost is the negative logarithm of a share."""
    top, rest, higher = merge_masses(a.top, a.rest, b.top, b.rest)
    entropy = share_a * a.entropy + share_b * b.entropy + (share_a * cost_a + share_b * cost_b)
    return Side(top, rest, tl.where(higher, b.mode, a.mode), entropy)


@triton.jit
def _weighted(share, value):
    """Return share * value; an infinite value's share is not 0, though it may have underflowed."""
    return tl.where(value == float("inf"), value, share * value)


@triton.jit
def merge(a, b):
    """Merge two groups; b's entries lie above a's."""
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
def _store_side(State, SIDE: tl.constexpr, side, rows, inside):
    """Write a side's fields, which begin at SIDE."""
    tl.store(State + (SIDE + SIDE_TOP) * rows, side.top, mask=inside)
    tl.store(State + (SIDE + SIDE_REST) * rows, side.rest, mask=inside)
    tl.store(State + (SIDE + SIDE_MODE) * rows, side.mode.to(tl.float32, bitcast=True), mask=inside)
    tl.store(State + (SIDE + SIDE_ENTROPY) * rows, side.entropy, mask=inside)


@triton.jit
def store_group(State, group, rows, inside):
    """Write a group into the record of its rows; State points at the rows."""
    _store_side(State, STATE_STUDENT, group.student, rows, inside)
    _store_side(State, STATE_TEACHER, group.teacher, rows, inside)
    tl.store(State + STATE_RATIO * rows, group.ratio, mask=inside)
    tl.store(State + STATE_FORWARD * rows, group.forward, mask=inside)
    tl.store(State + STATE_REVERSE * rows, group.reverse, mask=inside)


@triton.jit
def _load_side(State, SIDE: tl.constexpr, rows, inside):
    """Return a side whose fields begin at SIDE."""
    top = tl.load(State + (SIDE + SIDE_TOP) * rows, mask=inside, other=FLOOR)
    rest = tl.load(State + (SIDE + SIDE_REST) * rows, mask=inside, other=0.0)
    mode = tl.load(State + (SIDE + SIDE_MODE) * rows, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return Side(top, rest, mode, tl.load(State + (SIDE + SIDE_ENTROPY) * rows, mask=inside, other=0.0))


@triton.jit
def load_group(State, rows, inside):
    """Return the group that `store_group` wrote; an empty one outside."""
    student = _load_side(State, STATE_STUDENT, rows, inside)
    teacher = _load_side(State, STATE_TEACHER, rows, inside)
    ratio = tl.load(State + STATE_RATIO * rows, mask=inside, other=0.0)
    forward = tl.load(State + STATE_FORWARD * rows, mask=inside, other=0.0)
    return Group(student, teacher, ratio, forward, tl.load(State + STATE_REVERSE * rows, mask=inside, other=0.0))
