"""The elementwise math of python_api/topd/ops/shared/row_math.py for Triton, as csrc/shared/row_math.h has it in C++.

Names and formulas are those files'. Functions take float32 or float64 blocks or scalars, and stay in that dtype.
"""

import triton
import triton.language as tl

# d is held in [-FAR, FAR]: an entry without probability on one side then contributes what it should with no case of its own.
FAR = tl.constexpr(1e30)
# The logit of probability 0 where differences of logits must stay finite: its exp is 0 beside any other.
FLOOR = tl.constexpr(-FAR.value)
# A log-ratio beyond this is that of an entry which one side forbids.
FORBIDDEN = tl.constexpr(1e29)
# Where both sides' logits are shifted by no further than this, their difference is taken as it is: that of near-equal numbers
# is exact, that of shifted ones is not.
NEAR_OFFSETS = tl.constexpr(4.0)
# What stands in a tile for an entry that was taken out of its row: the lowest finite float32, which no product takes.
LEFT_OUT = tl.constexpr(-3.4028234663852886e38)
# Above every entry's number.
NO_ENTRY = tl.constexpr(2147483647)

# phi in float32, fitted to 5e-9 for |d| <= 1: phi(d) = q (even - d odd), q = d d, where
# even = 1/2 + PHI_EVEN_1 q + PHI_EVEN_2 q q + ... and odd = 1/6 + PHI_ODD_1 q + ...
PHI_EVEN_1 = tl.constexpr(4.1666734964e-02)
PHI_EVEN_2 = tl.constexpr(1.3885394437e-03)
PHI_EVEN_3 = tl.constexpr(2.5358644052e-05)
PHI_ODD_1 = tl.constexpr(8.3333393559e-03)
PHI_ODD_2 = tl.constexpr(1.9838100707e-04)
PHI_ODD_3 = tl.constexpr(2.8062904676e-06)


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
def mixture(p_teacher, p_student, d, near, beta, rest):
    """Return m = (1 - beta) p_S + beta p_T, where rest = 1 - beta; the sides' log-ratios to it and relative excesses over it,
    teacher first, accurate near p_S = p_T."""
    size = tl.abs(d)
    teacher_smaller = d <= 0
    less = tl.where(teacher_smaller, beta, rest)
    more = tl.where(teacher_smaller, rest, beta)
    ratio = tl.exp(-size)
    phi_size, _ = phi_pair(size)
    e = tl.where(near, phi_size - size, ratio - 1)
    excess = less * e
    mild = excess >= -0.5
    share = tl.where(mild, 1 + excess, more + less * ratio)
    larger_d = -tl.where(mild, log1p(tl.maximum(excess, -0.5)), tl.log(share))
    smaller_d = larger_d - size
    larger_excess = -excess / share
    smaller_excess = more * e / share
    return (
        rest * p_student + beta * p_teacher,
        tl.where(teacher_smaller, smaller_d, larger_d),
        tl.where(teacher_smaller, larger_d, smaller_d),
        tl.where(teacher_smaller, smaller_excess, larger_excess),
        tl.where(teacher_smaller, larger_excess, smaller_excess),
    )


@triton.jit
def logits_of(product, Bias, entries, mask, biased, inner, outer, capped, GENERAL: tl.constexpr):
    """Return the logits / temperature of products; -inf where masked or left out. inner = scale / temperature, or scale /
    softcap with outer = softcap / temperature where capped. GENERAL: a bias or a softcap is there."""
    y = product
    if GENERAL:
        if biased:
            y += tl.load(Bias + entries, mask=mask, other=0.0)
        y *= inner
        if capped:
            y = outer * tanh(y)
    else:
        y *= inner
    return tl.where(mask & (product != LEFT_OUT), y, float("-inf"))


@triton.jit
def slope_of(logits, steep, unit, capped, GENERAL: tl.constexpr):
    """Return d logits / d product; steep = scale / temperature, unit = temperature / softcap."""
    slope = tl.zeros_like(logits) + steep
    if GENERAL:
        if capped:
            t = tl.maximum(logits * unit, -1.0)
            slope = steep * (1 - t * t)
    return slope


@triton.jit
def lane_update(y, entries, top, index, rest):
    """Take one more entry a lane: return its largest so far, where that is, the sum of exp(y - top) over the others, whether
    the new one is the largest, and exp(-|y - top|)."""
    above = y > top
    e = tl.where(y == float("-inf"), 0.0, tl.exp(-tl.abs(y - top)))
    rest = tl.where(above, (rest + 1) * e, rest + e)
    return tl.where(above, y, top), tl.where(above, entries, index), rest, above, e


@triton.jit
def over_lanes(top, index, rest):
    """Merge the lanes: return the largest entry (the first of equals), its index, the sum over the others, which lane it is in,
    and each lane's factor."""
    best = tl.max(top, 0)
    first = tl.min(tl.where(top == best, index, NO_ENTRY), 0)
    is_mode = (top == best) & (index == first)
    factor = tl.where(top == float("-inf"), 0.0, tl.exp(top - best))
    return best, first, tl.sum(tl.where(is_mode, rest, factor * (1 + rest)), 0), is_mode, factor


@triton.jit
def merge(top, rest, other_top, other_rest):
    """Merge two parts of a row: return top, rest, whether the other's is larger, and exp(lower - upper)."""
    higher = other_top > top
    upper = tl.where(higher, other_top, top)
    lower = tl.where(higher, top, other_top)
    gap = tl.where(lower == float("-inf"), 0.0, tl.exp(lower - upper))
    merged = tl.where(higher, other_rest + gap * (1 + rest), rest + gap * (1 + other_rest))
    return upper, merged, higher, gap
