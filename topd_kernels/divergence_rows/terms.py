"""The divergences for Triton: one entry of both distributions, its term of the value, and what its gradient is made of.

Formulas are those of python_api/topd/ops/linear_divergence/eager.py. A forward KL with an entry clip is a kind of its own.
"""

import triton
import triton.language as tl

from topd_kernels.shared.records import numbered
from topd_kernels.shared.row_math import FAR, NEAR_OFFSETS, kl_term, mixture, phi_pair

# Their order matters: kinds from REVERSE_KL on are centred, and those after it keep more in registers.
FORWARD_KL, CLIPPED_KL, REVERSE_KL, JSD, SKEW_KL, SKEW_REVERSE_KL, TOTAL_VARIATION = numbered(7)


@triton.jit
def log_ratio(ys, yt, student_top, teacher_top, rest_gap):
    """Return d = log p_T - log p_S; 0 where both are 0. Subtracts the logits themselves where their offsets are near, since the
    difference of near-equal numbers is exact, and the shifted ones where the offsets are far apart."""
    shift = teacher_top - student_top
    near = tl.abs(shift) <= NEAR_OFFSETS
    d = (yt - tl.where(near, 0.0, teacher_top)) - (ys - tl.where(near, 0.0, student_top))
    d = d - tl.where(near, shift, 0.0) - rest_gap
    no_student = ys == float("-inf")
    no_teacher = yt == float("-inf")
    d = tl.where(no_student, tl.where(no_teacher, 0.0, FAR), tl.where(no_teacher, -FAR, d))
    return tl.minimum(tl.maximum(d, -FAR), FAR)


@triton.jit
def student_minus_teacher(p_teacher, p_student, d, near, phi_plus):
    """Return p_S - p_T, with its digits where the two are near."""
    return tl.where(near, p_teacher * (phi_plus - d), p_student - p_teacher)


@triton.jit
def mixture_term(p_teacher, p_student, d, near, parameter, complement, KIND: tl.constexpr):
    """Return value and A of a divergence against a mixture. The JSD's parts q - p cancel, so where |d| > 1 only p d remain."""
    if KIND == SKEW_REVERSE_KL:
        m, _, student_d, _, student_excess = mixture(p_teacher, p_student, d, near, complement, parameter)
        phi_d, _ = phi_pair(student_d)
        return kl_term(p_student, m, student_d, tl.abs(student_d) <= 1, phi_d), student_d - parameter * student_excess
    m, teacher_d, student_d, teacher_excess, _ = mixture(p_teacher, p_student, d, near, parameter, complement)
    phi_teacher, _ = phi_pair(teacher_d)
    if KIND == SKEW_KL:
        return kl_term(p_teacher, m, teacher_d, tl.abs(teacher_d) <= 1, phi_teacher), -complement * teacher_excess
    phi_student, _ = phi_pair(student_d)
    teacher = parameter * p_teacher
    student = complement * p_student
    value = tl.where(near, teacher * phi_teacher + student * phi_student, teacher * teacher_d + student * student_d)
    return value, complement * student_d


@triton.jit
def term_of(p_teacher, p_student, d, parameter, complement, KIND: tl.constexpr):
    """Return a term of the value, A, and a term of E. The gradient is A - p_S E for the two forward KLs, p_S (A - E) for the
    others, whose E is the sum of p_S A. complement = 1 - parameter, taken in double."""
    near = tl.abs(d) <= 1
    centre = d * 0
    if KIND == JSD or KIND == SKEW_KL or KIND == SKEW_REVERSE_KL:
        value, a = mixture_term(p_teacher, p_student, d, near, parameter, complement, KIND)
    else:
        phi_plus, phi_minus = phi_pair(d)
        if KIND == REVERSE_KL:
            value = kl_term(p_student, p_teacher, -d, near, phi_minus)
            a = -d
        else:
            a = student_minus_teacher(p_teacher, p_student, d, near, phi_plus)
            value = kl_term(p_teacher, p_student, d, near, phi_plus)
            if KIND == TOTAL_VARIATION:
                value = 0.5 * tl.abs(a)
                a = tl.where(a > 0, 0.5, tl.where(a < 0, -0.5, a * 0))
            elif KIND == CLIPPED_KL:
                e = tl.where(d >= FAR, FAR, p_teacher * d)
                clipped = e > parameter
                value = tl.where(clipped, a + parameter, value)
                a = tl.where(clipped, p_student, a)
                centre = tl.where(clipped, p_teacher, 0.0)
    return value, a, centre
