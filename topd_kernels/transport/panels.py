"""Plans that registers do not hold: costs and plan lie in a scratch matrix each, [COLUMNS, ROWS] in float64, and pass through
registers in panels of PANEL columns. tile.py does the same with smaller ones: columns are normalised
one by one; row sums, D and products with H add up over the panels. `columns` is how many count, b the marginal of each.

A thread may read what another one of its block wrote: each function here begins with a barrier.
"""

import triton
import triton.language as tl

from topd_kernels.transport.costs import costs, inverse_norms, side


@triton.jit
def _panel(start, columns, ROWS: tl.constexpr, PANEL: tl.constexpr):
    """Return where the entries of a panel stand in a scratch matrix, and which of its columns count."""
    panel_columns = start + tl.arange(0, PANEL)
    return panel_columns[:, None] * ROWS + tl.arange(0, ROWS)[None, :], panel_columns < columns


@triton.jit
def store_costs(
    Cost, StudentTable, TeacherTable, TeacherIds, TeacherLengths, problem, student_ids, is_row, teacher_window, columns, width,
    student_stride, teacher_stride,
    COST: tl.constexpr, ROWS: tl.constexpr, PANEL: tl.constexpr, PIECE: tl.constexpr, FLOAT: tl.constexpr,
    COMPENSATED: tl.constexpr,
):  # fmt: skip
    """Write the panels of the first `columns` columns; return their sum, and their largest entry less their smallest."""
    tl.debug_barrier()
    x_powers, x_scale = inverse_norms(StudentTable, student_ids, is_row, width, student_stride, COST, ROWS, PIECE, COMPENSATED)
    total = tl.full([], 0.0, tl.float64)
    high = tl.full([], 0.0, tl.float64)
    low = tl.full([], float("inf"), tl.float64)
    for start in range(0, columns, PANEL):
        ids, valid, _, _ = side(TeacherIds, TeacherLengths, problem, teacher_window, start + tl.arange(0, PANEL))
        powers, scale = inverse_norms(TeacherTable, ids, valid, width, teacher_stride, COST, PANEL, PIECE, COMPENSATED)
        cost = costs(
            TeacherTable, StudentTable, ids, student_ids, valid, is_row, powers, x_powers, scale, x_scale, width,
            teacher_stride, student_stride, COST, PANEL, ROWS, PIECE, FLOAT, COMPENSATED,
        )  # fmt: skip
        entries, _ = _panel(start, columns, ROWS, PANEL)
        tl.store(Cost + entries, cost)
        total += tl.sum(tl.sum(cost, 1), 0)
        high = tl.maximum(high, tl.max(tl.max(cost, 1), 0))
        counted = tl.where(valid[:, None] & is_row[None, :], cost, float("inf"))
        low = tl.minimum(low, tl.min(tl.min(counted, 1), 0))
    return total, high - low


@triton.jit
def evaluate_panels(
    f, Cost, Plan, is_row, a, unit_a, unit_b, columns, stage, ROWS: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    """Return what `evaluate` returns, but for P, which goes into Plan."""
    tl.debug_barrier()
    rows = a * 0
    transposed = unit_b * 0
    for start in range(0, columns, PANEL):
        entries, is_column = _panel(start, columns, ROWS, PANEL)
        scaled = tl.where(is_row[None, :], (f[None, :] - tl.load(Cost + entries)) * (1 / stage), float("-inf"))
        top = tl.max(scaled, 1)
        plan = tl.exp(scaled - top[:, None])
        total = tl.sum(plan, 1)
        plan = plan * tl.where(is_column, unit_b / total, 0.0)[:, None]
        tl.store(Plan + entries, plan)
        rows += tl.sum(plan, 0)
        transposed += tl.sum(tl.where(is_column, unit_b * (top + tl.log(total)), 0.0), 0)
    dual = tl.sum(a * f, 0) + stage * (tl.log(unit_b) - transposed)
    error = tl.max(tl.abs(rows - a), 0) / unit_a
    return rows, dual, tl.where(dual == dual, error, dual)  # a maximum may drop a NaN


@triton.jit
def curvatures_panels(Plan, like, b_inverse, columns, ROWS: tl.constexpr, PANEL: tl.constexpr):
    """Return what `curvatures` returns."""
    tl.debug_barrier()
    total = like * 0
    for start in range(0, columns, PANEL):
        entries, _ = _panel(start, columns, ROWS, PANEL)
        plan = tl.load(Plan + entries)
        total += tl.sum(plan * (1 - plan * b_inverse), 0)
    return total


@triton.jit
def coupled_panels(Plan, direction, b_inverse, columns, ROWS: tl.constexpr, PANEL: tl.constexpr):
    """Return what `coupled` returns."""
    tl.debug_barrier()
    total = direction * 0
    for start in range(0, columns, PANEL):
        entries, _ = _panel(start, columns, ROWS, PANEL)
        plan = tl.load(Plan + entries)
        through = tl.sum(plan * direction[None, :], 1) * b_inverse
        total += tl.sum(plan * through[:, None], 0)
    return total


@triton.jit
def _scaled_down(Plan, entries, is_column, row_scale, b):
    """Return a panel whose rows and columns hold no more than their marginals, and what its columns lack."""
    plan = tl.load(Plan + entries, mask=is_column[:, None], other=0.0) * row_scale[None, :]
    b = tl.where(is_column, b, 0.0)
    plan = plan * tl.minimum(b / tl.maximum(tl.sum(plan, 1), 1e-300), 1.0)[:, None]
    return plan, tl.maximum(b - tl.sum(plan, 1), 0.0)


@triton.jit
def store_rounded(
    Out, problem, Plan, Cost, is_row, rows, a, b, error, columns, student_window, teacher_window,
    ROWS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Write the plan as `rounded` does, into Out; return its distance. A problem without a solution has none anywhere."""
    tl.debug_barrier()
    row_scale = tl.minimum(a / tl.maximum(rows, 1e-300), 1.0)
    kept = a * 0
    for start in range(0, columns, PANEL):
        entries, is_column = _panel(start, columns, ROWS, PANEL)
        plan, _ = _scaled_down(Plan, entries, is_column, row_scale, b)
        kept += tl.sum(plan, 0)
    missing_a = tl.maximum(a - kept, 0.0)
    share = missing_a / tl.maximum(tl.sum(missing_a, 0), 1e-300)
    distance = error * 0
    row = problem * student_window + tl.arange(0, ROWS)[None, :]
    for start in range(0, teacher_window, PANEL):
        entries, is_column = _panel(start, columns, ROWS, PANEL)
        plan, missing_b = _scaled_down(Plan, entries, is_column, row_scale, b)
        plan += missing_b[:, None] * share[None, :]
        cost = tl.load(Cost + entries, mask=is_column[:, None], other=0.0)
        lost = is_column[:, None] & is_row[None, :] & (cost + error != cost + error)
        plan = tl.where(lost, error, plan)
        distance += tl.sum(tl.sum(plan * cost, 1), 0)
        column = (start + tl.arange(0, PANEL))[:, None]
        stored = (row < (problem + 1) * student_window) & (column < teacher_window)
        tl.store(Out + row * teacher_window + column, plan, mask=stored)
    return distance
