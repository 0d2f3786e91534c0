"""The elementwise math of python_api/topd/ops/shared/row_math.py for Triton, as csrc/shared/row_math.h has it in C++.

Names and formulas are those files'. Functions take float32 or float64 blocks or scalars, and stay in that dtype.
"""

import triton
import triton.language as tl

# d is held in [-FAR, FAR]: an entry without probability on one side then contributes what it should with no case of its own.
FAR = tl.constexpr(1e30)
# The logit of probability 0 where differences of logits must stay finite: its exp is 0 beside any other.
FLOOR = tl.constexpr(-FAR.value)
# Where both sides' logits are shifted by no further than this, their difference is taken as it is: that of near-equal numbers
# is exact, that of shifted ones is not.
NEAR_OFFSETS = tl.constexpr(4.0)
LOG2E = tl.constexpr(1.4426950408889634)

# phi in float32, fitted to 5e-9 for |d| <= 1: phi(d) = q (even - d odd), q = d d, where
# even = 1/2 + PHI_EVEN_1 q + PHI_EVEN_2 q q + ... and odd = 1/6 + PHI_ODD_1 q + ...
PHI_EVEN_1 = tl.constexpr(4.1666734964e-02)
PHI_EVEN_2 = tl.constexpr(1.3885394437e-03)
PHI_EVEN_3 = tl.constexpr(2.5358644052e-05)
PHI_ODD_1 = tl.constexpr(8.3333393559e-03)
PHI_ODD_2 = tl.constexpr(1.9838100707e-04)
PHI_ODD_3 = tl.constexpr(2.8062904676e-06)

# kappa in float32, fitted to 5e-9: log(1 + u) = u + u u kappa(u) for -1/2 <= u <= 0. From the highest power down.
KAPPA_9 = tl.constexpr(1.6124811561)
KAPPA_8 = tl.constexpr(2.2975909427)
KAPPA_7 = tl.constexpr(1.8241911928)
KAPPA_6 = tl.constexpr(0.5596312338)
KAPPA_5 = tl.constexpr(0.3055154552)
KAPPA_4 = tl.constexpr(-0.1437135666)
KAPPA_3 = tl.constexpr(0.2018291095)
KAPPA_2 = tl.constexpr(-0.2499269222)
KAPPA_1 = tl.constexpr(0.3333344539)
KAPPA_0 = tl.constexpr(-0.4999999972)
# A float32's bits beside its exponent's are below this; log 2 of it.
MANTISSA = tl.constexpr(1 << 23)
LN2_OF_MANTISSA = tl.constexpr(8.262958294867817e-08)


@triton.jit
def number(value, dtype: tl.constexpr):
    """Return a runtime float64 in dtype. Under the interpreter it is a Python float, which `tl.cast` would round to float32."""
    return (tl.full([], 0, dtype) + value).to(dtype)


@triton.jit
def held(x, dtype: tl.constexpr):
    """Return x in dtype, float16 held within its range."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@triton.jit
def exp(x):
    """Return exp(x). In float32 it is one exp2, which gives 0 below the normal numbers."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        e = tl.exp2(x * LOG2E)
    return e


@triton.jit
def log1p(x):
    """Return log(1 + x) for x >= -0.5, with the digits of a small x: 2 atanh(x / (2 + x)) as a series where |x| <= 0.5."""
    s = x / (2 + x)
    q = s * s
    series = q * 0 + 1 / 17
    if x.dtype == tl.float64:
        series = q * 0 + 1 / 37
        series = series * q + 1 / 35
        series = series * q + 1 / 33
        series = series * q + 1 / 31
        series = series * q + 1 / 29
        series = series * q + 1 / 27
        series = series * q + 1 / 25
        series = series * q + 1 / 23
        series = series * q + 1 / 21
        series = series * q + 1 / 19
        series = series * q + 1 / 17
    series = series * q + 1 / 15
    series = series * q + 1 / 13
    series = series * q + 1 / 11
    series = series * q + 1 / 9
    series = series * q + 1 / 7
    series = series * q + 1 / 5
    series = series * q + 1 / 3
    return tl.where(tl.abs(x) <= 0.5, 2 * s * (series * q + 1), tl.log(1 + x))


@triton.jit
def phi_pair(d):
    """Return phi(d) = exp(-d) + d - 1 and phi(-d) for |d| <= 1, from the two halves of one series."""
    q = d * d
    if d.dtype == tl.float64:
        even = q * 0 + 1 / 6402373705728000
        even = even * q + 1 / 20922789888000
        even = even * q + 1 / 87178291200
        even = even * q + 1 / 479001600
        even = even * q + 1 / 3628800
        even = even * q + 1 / 40320
        even = even * q + 1 / 720
        odd = q * 0 + 1 / 121645100408832000
        odd = odd * q + 1 / 355687428096000
        odd = odd * q + 1 / 1307674368000
        odd = odd * q + 1 / 6227020800
        odd = odd * q + 1 / 39916800
        odd = odd * q + 1 / 362880
        odd = odd * q + 1 / 5040
    else:
        even = q * PHI_EVEN_3 + PHI_EVEN_2
        odd = q * PHI_ODD_3 + PHI_ODD_2
    even = even * q + (1 / 24 if d.dtype == tl.float64 else PHI_EVEN_1)
    odd = odd * q + (1 / 120 if d.dtype == tl.float64 else PHI_ODD_1)
    even = even * q + 0.5
    odd = odd * q + 1 / 6
    return q * (even - d * odd), q * (even + d * odd)


@triton.jit
def expm1(x):
    """Return exp(x) - 1, from phi where |x| <= 1."""
    _, minus = phi_pair(x)
    return tl.where(tl.abs(x) <= 1, minus + x, tl.exp(x) - 1)


@triton.jit
def tanh(x):
    """Return tanh(x): below 1/2 from expm1(2 |x|), whose digits survive; beyond from exp(-2 |x|), which cannot overflow."""
    size = tl.abs(x)
    small = expm1(2 * tl.minimum(size, 0.5))
    e = tl.exp(-2 * size)
    out = tl.where(size <= 0.5, small / (small + 2), (1 - e) / (1 + e))
    return tl.where(x < 0, -out, out)


@triton.jit
def kl_term(p, q, d, near, phi_d):
    """Return a non-negative term of KL(p || q), d = log p - log q: p phi(d) where |d| <= 1 (`near`), q - p + p d elsewhere."""
    return tl.where(near, p * phi_d, q - p + p * d)


@triton.jit
def kappa(u):
    """Return (log(1 + u) - u) / (u u) for -1/2 <= u <= 0, in float32."""
    k = u * KAPPA_9 + KAPPA_8
    k = k * u + KAPPA_7
    k = k * u + KAPPA_6
    k = k * u + KAPPA_5
    k = k * u + KAPPA_4
    k = k * u + KAPPA_3
    k = k * u + KAPPA_2
    k = k * u + KAPPA_1
    return k * u + KAPPA_0


@triton.jit
def log_share(share, excess):
    """Return log(share) for 0 < share <= 1, where excess = share - 1; whether it is a series in the excess, as where share is
    1/2 at least; and in float32 that series' kappa."""
    if share.dtype == tl.float64:
        mild = excess >= -0.5
        log = tl.where(mild, log1p(tl.maximum(excess, -0.5)), tl.log(share))
        k = excess
    else:  # share = 2^n (1 + u), -1/2 <= u <= 0 but for a few ulp, which a share rounded above 1 needs
        bits = share.to(tl.int32, bitcast=True)
        exponent = (bits - (MANTISSA * 126 + 16)) & -MANTISSA
        mild = exponent == 0
        u = tl.where(mild, excess, (bits - exponent).to(tl.float32, bitcast=True) - 1)
        k = kappa(u)
        log = exponent.to(tl.float32) * LN2_OF_MANTISSA + (u * u * k + u)
    return log, mild, k


@triton.jit
def inverse(x):
    """Return 1 / x for x > 0."""
    if x.dtype == tl.float64:
        y = 1 / x
    else:
        root = tl.rsqrt(x)
        y = root * root
    return y


@triton.jit
def parts_of_mixture(d, near, beta, rest):
    """Return of m = (1 - beta) p_S + beta p_T, rest = 1 - beta, what `mixture` is made of, relative to the larger side: the
    smaller one over it and that less 1, the smaller one's weight and the larger one's, m over it and that less 1, and the
    logarithm of m over it, whether it is a series, and kappa (float32)."""
    size = tl.abs(d)
    teacher_smaller = d <= 0
    less = tl.where(teacher_smaller, beta, rest)
    more = tl.where(teacher_smaller, rest, beta)
    ratio = exp(-size)
    phi_size, _ = phi_pair(size)
    e = tl.where(near, phi_size - size, ratio - 1)
    excess = less * e
    share = more + less * ratio
    log, mild, k = log_share(share, excess)
    return ratio, e, less, more, share, excess, mild, log, k


@triton.jit
def mixture(p_teacher, p_student, d, near, beta, rest):
    """Return m = (1 - beta) p_S + beta p_T, where rest = 1 - beta; the sides' log-ratios to it and relative excesses over it,
    teacher first, accurate near p_S = p_T."""
    _, e, _, more, share, excess, _, log, _ = parts_of_mixture(d, near, beta, rest)
    teacher_smaller = d <= 0
    upside_down = inverse(share)
    larger_excess = -excess * upside_down
    smaller_excess = more * e * upside_down
    return (
        rest * p_student + beta * p_teacher,
        tl.minimum(d, 0.0) - log,
        -tl.maximum(d, 0.0) - log,
        tl.where(teacher_smaller, smaller_excess, larger_excess),
        tl.where(teacher_smaller, larger_excess, smaller_excess),
    )
