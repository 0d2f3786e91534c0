"""The divergences for Triton: one entry of both distributions, its term of the value, and what its gradient is made of.

Formulas are those of python_api/topd/ops/linear_divergence/eager.py. A forward KL with an entry clip is a kind of its own, and
so is the JSD at beta = 1/2 in float32, as in csrc/cpu/divergence_terms.h.
"""

import triton
import triton.language as tl

from topd_kernels.shared.records import numbered
from topd_kernels.shared.row_math import FAR, NEAR_OFFSETS, exp, kappa, kl_term, mixture, parts_of_mixture, phi_pair

# Their order matters: kinds from REVERSE_KL on are centred, and those after it keep more in registers.
FORWARD_KL, CLIPPED_KL, REVERSE_KL, JSD, EVEN_JSD, SKEW_KL, SKEW_REVERSE_KL, TOTAL_VARIATION = numbered(8)


@triton.jit
def log_ratio_numbers(student_top, teacher_top):
    """Return what `log_ratio` subtracts from the student's logit, from the teacher's, and from both's difference: it takes the
    logits themselves where the sides' offsets are near, since the difference of near-equal numbers is exact, and the shifted
    ones where the offsets are far apart."""
    shift = teacher_top - student_top
    near = tl.abs(shift) <= NEAR_OFFSETS
    return tl.where(near, 0.0, student_top), tl.where(near, 0.0, teacher_top), tl.where(near, shift, 0.0)


@triton.jit
def log_ratio(ys, yt, student_first, teacher_first, shift, rest_gap, FINITE: tl.constexpr):
    """Return d = log p_T - log p_S; 0 where both are 0. FINITE: every logit is. The offsets' difference and that of the sums
    over the others are subtracted one by one: where the sides are certain, the second is all that is left of d."""
    d = ((yt - teacher_first) - (ys - student_first)) - shift - rest_gap
    if not FINITE:
        no_student = ys == float("-inf")
        no_teacher = yt == float("-inf")
        d = tl.where(no_student, tl.where(no_teacher, 0.0, FAR), tl.where(no_teacher, -FAR, d))
        d = tl.minimum(tl.maximum(d, -FAR), FAR)
    return d


@triton.jit
def student_minus_teacher(p_teacher, p_student, d, near, phi_plus):
    """Return p_S - p_T, with its digits where the two are near."""
    return tl.where(near, p_teacher * (phi_plus - d), p_student - p_teacher)


@triton.jit
def jsd_term(p_teacher, p_student, d, near, parameter, complement):
    """Return value and A of the JSD. Where |d| > 1 the parts q - p cancel, so only p d remain. Where the sides are near, with
    psi(x) = (1 + x) log(1 + x) - x, a term is larger p (less psi(smaller / larger - 1) - psi(m / larger - 1))."""
    ratio, _, less, _, share, excess, mild, log, k = parts_of_mixture(d, near, parameter, complement)
    teacher_d = tl.minimum(d, 0.0) - log
    student_d = -tl.maximum(d, 0.0) - log
    teacher = parameter * p_teacher
    student = complement * p_student
    far = teacher * teacher_d + student * student_d
    if d.dtype == tl.float64:
        phi_teacher, _ = phi_pair(teacher_d)
        phi_student, _ = phi_pair(student_d)
        value = tl.where(near, teacher * phi_teacher + student * phi_student, far)
    else:
        _, phi_minus = phi_pair(tl.abs(d))
        of_excess = excess * excess * (share * k + 1)
        gained = tl.maximum(less * ratio * phi_minus - of_excess, 0.0)
        value = tl.where(near & mild, tl.maximum(p_teacher, p_student) * gained, far)
    return value, student_d


@triton.jit
def even_jsd_term(p_teacher, p_student, d, near):
    """Return value and A of the JSD at beta = 1/2, in float32. There m is half the larger side at least, so that its logarithm
    is one series, and a term is half of what `jsd_term` takes the psi of, wherever d lies."""
    size = tl.abs(d)
    ratio = exp(-size)
    phi_plus, phi_minus = phi_pair(size)
    e = tl.where(near, phi_plus - size, ratio - 1)
    u = 0.5 * e
    square = u * u
    k = kappa(u)
    gained = tl.where(near, ratio * phi_minus, -(ratio * size + e))
    value = tl.maximum(p_teacher, p_student) * (0.5 * gained - square * ((u + 1) * k + 1))
    return value, -(square * k + u) - tl.maximum(d, 0.0)


@triton.jit
def skewed_term(p_teacher, p_student, d, near, parameter, complement, KIND: tl.constexpr):
    """Return value and A of a KL against a mixture."""
    if KIND == SKEW_REVERSE_KL:
        m, _, student_d, _, student_excess = mixture(p_teacher, p_student, d, near, complement, parameter)
        phi_d, _ = phi_pair(student_d)
        value = kl_term(p_student, m, student_d, tl.abs(student_d) <= 1, phi_d)
        a = student_d - parameter * student_excess
    else:
        m, teacher_d, _, teacher_excess, _ = mixture(p_teacher, p_student, d, near, parameter, complement)
        phi_d, _ = phi_pair(teacher_d)
        value = kl_term(p_teacher, m, teacher_d, tl.abs(teacher_d) <= 1, phi_d)
        a = teacher_excess
    return value, a


@triton.jit
def factor_of_a(complement, KIND: tl.constexpr):
    """Return what a kind's gradient is multiplied by, once the row's sums are taken: exactly 0 stays so."""
    factor = tl.full([], 1.0, complement.dtype)
    if KIND == JSD or KIND == EVEN_JSD:
        factor = complement
    elif KIND == SKEW_KL:
        factor = -complement
    return factor


@triton.jit
def term_of(p_teacher, p_student, d, parameter, complement, KIND: tl.constexpr):
    """Return a term of the value, A, and a term of E. The gradient is A - p_S E for the two forward KLs, p_S (A - E) times
    `factor_of_a` for the others, whose E is the sum of p_S A. complement = 1 - parameter, taken in double."""
    near = tl.abs(d) <= 1
    centre = d * 0
    if KIND == JSD:
        value, a = jsd_term(p_teacher, p_student, d, near, parameter, complement)
    elif KIND == EVEN_JSD:
        value, a = even_jsd_term(p_teacher, p_student, d, near)
    elif KIND == SKEW_KL or KIND == SKEW_REVERSE_KL:
        value, a = skewed_term(p_teacher, p_student, d, near, parameter, complement, KIND)
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
