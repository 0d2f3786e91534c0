"""The six divergences for Triton: one entry of both distributions, its term of the value, and what its gradient is made of.
Formulas are those of topd/ops/linear_divergence/eager.py."""

import triton
import triton.language as tl

from topd_kernels.shared.row_math import FAR, kl_term, mixture, phi_pair

FORWARD_KL = tl.constexpr(0)
CLIPPED_KL = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
JSD = tl.constexpr(3)
SKEW_KL = tl.constexpr(4)
SKEW_REVERSE_KL = tl.constexpr(5)
TOTAL_VARIATION = tl.constexpr(6)


def kind_of(divergence: str, parameter: float) -> int:
    """The kernels' number of a divergence; a forward KL with an entry clip is a kind of its own."""
    if divergence == "forward_kl":
        return CLIPPED_KL.value if parameter != float("inf") else FORWARD_KL.value
    kinds = {
        "reverse_kl": REVERSE_KL,
        "jsd": JSD,
        "skew_kl": SKEW_KL,
        "skew_reverse_kl": SKEW_REVERSE_KL,
        "total_variation": TOTAL_VARIATION,
    }
    if divergence not in kinds:
        raise ValueError(f"unknown divergence {divergence!r}")
    return int(kinds[divergence].value)


@triton.jit
def log_ratio(ys, yt, student_top, teacher_top, rest_gap):
    """d = log p_T - log p_S; 0 where both are 0. Subtracts the logits themselves where their offsets are near, since the
    difference of near-equal numbers is exact, and the shifted ones where the offsets are far apart."""
    shift = teacher_top - student_top
    near = tl.abs(shift) <= 4
    d = (yt - tl.where(near, 0.0, teacher_top)) - (ys - tl.where(near, 0.0, student_top))
    d = d - tl.where(near, shift, 0.0) - rest_gap
    no_student = ys == float("-inf")
    no_teacher = yt == float("-inf")
    d = tl.where(no_student, tl.where(no_teacher, 0.0, FAR), tl.where(no_teacher, -FAR, d))
    return tl.minimum(tl.maximum(d, -FAR), FAR)


@triton.jit
def student_minus_teacher(p_teacher, p_student, d, near, phi_plus):
    return tl.where(near, p_teacher * (phi_plus - d), p_student - p_teacher)


@triton.jit
def mixture_term(p_teacher, p_student, d, near, parameter, complement, KIND: tl.constexpr):
    """Value and A of the divergences against a mixture. The JSD's parts q - p cancel, so where |d| > 1 only p d remain."""
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
    """A term of the value, A, and a term of E. The gradient is A - p_S E for the two forward KLs, p_S (A - E) for the others,
    whose E is the sum of p_S A. complement = 1 - parameter, taken in double."""
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
