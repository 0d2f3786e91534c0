"""Reading for transport: a problem's windows, and the costs between their tokens, a block of them at a time.

Sums over the hidden width hold the digits of float64. Where float64 is slow they are kept as the sum of two float32 numbers
(COMPENSATED): what an addition rounds off is known exactly (Knuth 1969, TwoSum), and added up beside it. Nothing in it changes
where a compiler makes a product and a sum one instruction: the only products that are added at once are exact ones.
"""

import triton
import triton.language as tl

from topd_kernels.shared.records import numbered

COSTS = ("cosine", "sqeuclidean", "mismatch")
COSINE, SQEUCLIDEAN, MISMATCH = numbered(3)  # places in COSTS


@triton.jit
def side(Ids, Lengths, problem, window, places):
    """Return the ids of the tokens at these places of a window, which of them count, the marginal, and 1 / length, its unit."""
    length = tl.load(Lengths + problem)
    valid = (places < length) & (places < window)
    ids = tl.load(Ids + problem * window + places, mask=valid, other=0)
    unit = 1 / length.to(tl.float64)
    return ids, valid, tl.where(valid, unit, 0.0), unit


@triton.jit
def _vectors(Table, ids, valid, start, width, stride, PIECE: tl.constexpr):
    """Return entries start, start + 1, ... [PIECE, K] of the rows of these ids; 0 past their end and past the lengths."""
    columns = start + tl.arange(0, PIECE)
    mask = (columns < width)[:, None] & valid[None, :]
    return tl.load(Table + ids[None, :] * stride + columns[:, None], mask=mask, other=0.0)


@triton.jit
def _added(high, low, term):
    """Return high + low + term as two float32: the sum rounded, and beside it what all sums have rounded off."""
    total = high + term
    part = total - high
    return total, low + ((high - (total - part)) + (term - part))


@triton.jit
def _widened(high, low):
    """Return the float64 that two float32 add up to. Past float32's range it is what `high` says: what was rounded off is
    then no number."""
    return high.to(tl.float64) + tl.where(tl.abs(high) < float("inf"), low, 0.0).to(tl.float64)


@triton.jit
def _powers(Table, ids, valid, width, stride, K: tl.constexpr, PIECE: tl.constexpr):
    """Return for each row the power of two that brings its largest entry near 1; as near as float32 has powers of two."""
    largest = tl.zeros([K], tl.float32)
    for start in range(0, width, PIECE):
        x = _vectors(Table, ids, valid, start, width, stride, PIECE).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    return (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _compensated_norms(Table, ids, valid, powers, width, stride, K: tl.constexpr, PIECE: tl.constexpr):
    """Return the norms of the rows times their powers."""
    high = tl.zeros([PIECE, K], tl.float32)
    low = tl.zeros([PIECE, K], tl.float32)
    for start in range(0, width, PIECE):
        x = _vectors(Table, ids, valid, start, width, stride, PIECE).to(tl.float32) * powers[None, :]
        # The first 12 bits of x, whose square float32 holds.
        first = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        high, low = _added(high, low, first * first)
        low += (x - first) * (x + first)
    return tl.sqrt(tl.sum(_widened(high, low), 0))


@triton.jit
def inverse_norms(
    Table, ids, valid, width, stride, COST: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr, COMPENSATED: tl.constexpr
):  # fmt: skip
    """Return a power of two and 1 / |power row|, in float64: the squares of float32 may leave its range. The power is 1 but
    where sums are compensated. 1 for a zero vector, which stays one, and for every cost but the cosine, which alone reads."""
    powers = tl.full([K], 1.0, tl.float32)
    norm = tl.zeros([K], tl.float64)
    if COST == COSINE:
        if COMPENSATED:
            powers = _powers(Table, ids, valid, width, stride, K, PIECE)
            norm = _compensated_norms(Table, ids, valid, powers, width, stride, K, PIECE)
        else:
            total = tl.zeros([PIECE, K], tl.float64)
            for start in range(0, width, PIECE):
                x = _vectors(Table, ids, valid, start, width, stride, PIECE).to(tl.float64)
                total += x * x
            norm = tl.sqrt(tl.sum(total, 0))
    return powers, 1 / tl.where(norm == 0, 1.0, norm)


@triton.jit
def _unit(x, powers, scale, FLOAT: tl.constexpr, COMPENSATED: tl.constexpr):
    """Return vectors [PIECE, K] of length 1."""
    if COMPENSATED:
        x = x.to(tl.float32) * powers[None, :]
        first = scale.to(tl.float32)
        return x * first[None, :] + x * (scale - first.to(tl.float64)).to(tl.float32)[None, :]
    return (x.to(tl.float64) * scale[None, :]).to(FLOAT)


@triton.jit
def costs(
    XTable, YTable, x_ids, y_ids, is_x, is_y, x_powers, y_powers, x_scale, y_scale, width, x_stride, y_stride,
    COST: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, PIECE: tl.constexpr, FLOAT: tl.constexpr,
    COMPENSATED: tl.constexpr,
):  # fmt: skip
    """Return the costs [X, Y] in float64; 0 past the lengths. x_powers, x_scale and so on: what `inverse_norms` returns."""
    if COST == MISMATCH:
        total = (x_ids[:, None] != y_ids[None, :]).to(tl.float64)
    else:
        SUM: tl.constexpr = tl.float32 if COMPENSATED else tl.float64
        total = tl.zeros([X, Y], SUM)
        low = tl.zeros([X, Y], SUM)
        for start in range(0, width, PIECE):
            x = _vectors(XTable, x_ids, is_x, start, width, x_stride, PIECE)
            y = _vectors(YTable, y_ids, is_y, start, width, y_stride, PIECE)
            if COST == COSINE:
                x = _unit(x, x_powers, x_scale, FLOAT, COMPENSATED)
                y = _unit(y, y_powers, y_scale, FLOAT, COMPENSATED)
                terms = x[:, :, None] * y[:, None, :]
            else:
                gaps = x.to(FLOAT)[:, :, None] - y.to(FLOAT)[:, None, :]
                terms = gaps * gaps
            if COMPENSATED:
                total, low = _added(total, low, tl.sum(terms, 0))
            else:
                total += tl.sum(terms, 0).to(tl.float64)
        if COMPENSATED:
            total = _widened(total, low)
        if COST == COSINE:
            total = 1 - total
            total = tl.where(total < 0, 0.0, total)
    return tl.where(is_x[:, None] & is_y[None, :], total, 0.0)
