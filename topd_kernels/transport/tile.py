"""Plans of up to 64 x 64 in registers, [ROWS, COLUMNS] in float64; panels.py does the same with larger ones."""

import triton
import triton.language as tl


@triton.jit
def evaluate(f, cost, is_row, a, b, unit_a, unit_b, stage):
    """Return P with exact columns at (f, stage), its row sums, D(f), and the largest |row sum - marginal| in units of it."""
    scaled = tl.where(is_row[:, None], (f[:, None] - cost) * (1 / stage), float("-inf"))
    top = tl.max(scaled, 0)
    plan = tl.exp(scaled - top[None, :])
    total = tl.sum(plan, 0)
    plan = plan * (b / total)[None, :]
    rows = tl.sum(plan, 1)
    dual = tl.sum(a * f, 0) + stage * (tl.log(unit_b) - tl.sum(b * (top + tl.log(total)), 0))
    error = tl.max(tl.abs(rows - a), 0) / unit_a
    return plan, rows, dual, tl.where(dual == dual, error, dual)  # a maximum may drop a NaN


@triton.jit
def curvatures(plan, b_inverse):
    """Return what P diag(1/b) Pᵀ leaves of the row sums on H's diagonal."""
    return tl.sum(plan * (1 - plan * b_inverse[None, :]), 1)


@triton.jit
def coupled(plan, direction, b_inverse):
    """Return P diag(1/b) Pᵀ direction."""
    columns = tl.sum(plan * direction[:, None], 0) * b_inverse
    return tl.sum(plan * columns[None, :], 1)


@triton.jit
def rounded(plan, rows, a, b):
    """Return the plan moved onto its marginals: rows and columns scaled down where they hold too much, the rest spread
    evenly."""
    plan = plan * tl.minimum(a / tl.maximum(rows, 1e-300), 1.0)[:, None]
    plan = plan * tl.minimum(b / tl.maximum(tl.sum(plan, 0), 1e-300), 1.0)[None, :]
    missing_a = tl.maximum(a - tl.sum(plan, 1), 0.0)
    missing_b = tl.maximum(b - tl.sum(plan, 0), 0.0)
    return plan + missing_a[:, None] * (missing_b / tl.maximum(tl.sum(missing_a, 0), 1e-300))[None, :]
