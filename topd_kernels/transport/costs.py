"""Reading for transport: a problem's windows, and the costs between their tokens, a block of them at a time."""

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
def inverse_norms(Table, ids, valid, width, stride, COST: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr):
    """Return 1 / |row|, in float64: the squares of float32 may leave its range. 1 for a zero vector, which stays one, and for
    every cost but the cosine, which alone reads."""
    total = tl.zeros([PIECE, K], tl.float64)
    if COST == COSINE:
        for start in range(0, width, PIECE):
            x = _vectors(Table, ids, valid, start, width, stride, PIECE).to(tl.float64)
            total += x * x
    norm = tl.sqrt(tl.sum(total, 0))
    return 1 / tl.where(norm == 0, 1.0, norm)


@triton.jit
def costs(
    XTable, YTable, x_ids, y_ids, is_x, is_y, x_scale, y_scale, width, x_stride, y_stride,
    COST: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, PIECE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Return the costs [X, Y] in float64; 0 past the lengths. x_scale, y_scale: inverse norms."""
    if COST == MISMATCH:
        total = (x_ids[:, None] != y_ids[None, :]).to(tl.float64)
    else:
        total = tl.zeros([X, Y], tl.float64)
        for start in range(0, width, PIECE):
            x = _vectors(XTable, x_ids, is_x, start, width, x_stride, PIECE)
            y = _vectors(YTable, y_ids, is_y, start, width, y_stride, PIECE)
            if COST == COSINE:
                x = (x.to(tl.float64) * x_scale[None, :]).to(FLOAT)
                y = (y.to(tl.float64) * y_scale[None, :]).to(FLOAT)
                terms = x[:, :, None] * y[:, None, :]
            else:
                gaps = x.to(FLOAT)[:, :, None] - y.to(FLOAT)[:, None, :]
                terms = gaps * gaps
            total += tl.sum(terms, 0).to(tl.float64)
        if COST == COSINE:
            total = 1 - total
            total = tl.where(total < 0, 0.0, total)
    return tl.where(is_x[:, None] & is_y[None, :], total, 0.0)
