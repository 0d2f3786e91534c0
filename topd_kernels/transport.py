"""topd::transport in Triton: m optimal-transport problems, one program a problem, one launch.

The definition of the math, and the names, are those of topd/reference/transport.py. What differs:

- the Newton system H v = a - r, H = diag(r) - P diag(1/b) Pᵀ, is solved by conjugate gradients with H's diagonal as
  preconditioner, so that the plan in registers is all that a product with H needs. H is singular along the ones, to which
  a - r is orthogonal; the ridge can then be 1e-10 of a marginal, and a tolerance of 1e-9 takes tens of iterations rather than
  hundreds. A system is solved to the error of its plan, at most 0.1: one to ten steps at usual tolerances;
- the iteration is a loop of single passes, each an evaluation of the plan at f + size * step and what follows from it, so that
  the binary holds two copies of the evaluation (the other is the final one) and no plan lives from one pass to the next.

Precision: vectors, plans, sums, potentials and costs in float64. Products of table entries in the tables' float (16-bit:
float32), their sums in float64, in pieces of PIECE entries. A float64 plan of more than 64 x 64 does not fit into registers:
longer windows are left to the reference.

Read per problem: its ids, two lengths, and (K_S + K_T) rows of the tables, twice for the cosine. Written: K_S K_T entries of
the plan, a distance, an error.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from topd_kernels.launch import Launch, run_all
from topd_kernels.row_math import number

COSTS = ("cosine", "sqeuclidean", "mismatch")
COSINE, SQEUCLIDEAN, MISMATCH = (tl.constexpr(i) for i in range(3))
MAX_WINDOW = 64
STAGE_FACTOR, STAGE_TOLERANCE, STAGE_SINKHORN = tl.constexpr(4.0), tl.constexpr(0.1), tl.constexpr(2)
RIDGE = tl.constexpr(1e-10)
DUAL_FLOAT32 = tl.constexpr(1e-6)  # what D is known to from float32 tiles, in units of epsilon
ARMIJO, MAX_HALVINGS = tl.constexpr(1e-4), tl.constexpr(20)
# What the pass evaluates: a plain step, a step of Newton's, the same f at a lower stage, f again after a search in vain.
PLAIN, SEARCH, LOWERED, GAVE_UP = (tl.constexpr(i) for i in range(4))
# What conjugate gradients solve a Newton system to: the plan's error, within these.
COARSEST, FINEST = tl.constexpr(0.1), tl.constexpr(1e-6)


@triton.jit
def _vectors(Table, ids, valid, start, width, stride, PIECE: tl.constexpr):
    """[PIECE, K]: entries start, start + 1, ... of the rows at ids; 0 past their end and past the lengths."""
    at = start + tl.arange(0, PIECE)
    return tl.load(Table + ids[None, :] * stride + at[:, None], mask=(at < width)[:, None] & valid[None, :], other=0.0)


@triton.jit
def _inverse_norms(Table, ids, valid, width, stride, K: tl.constexpr, PIECE: tl.constexpr):
    """In float64: the squares of float32 may leave its range. 1 for a zero vector, which stays one."""
    total = tl.zeros([PIECE, K], tl.float64)
    for start in range(0, width, PIECE):
        x = _vectors(Table, ids, valid, start, width, stride, PIECE).to(tl.float64)
        total += x * x
    norm = tl.sqrt(tl.sum(total, 0))
    return 1 / tl.where(norm == 0, 1.0, norm)


@triton.jit
def _costs(
    StudentTable, TeacherTable, student_ids, teacher_ids, is_row, is_column, width, student_stride, teacher_stride,
    COST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] in float64; 0 past the lengths."""
    if COST == MISMATCH:
        total = (student_ids[:, None] != teacher_ids[None, :]).to(tl.float64)
    else:
        if COST == COSINE:
            x_scale = _inverse_norms(StudentTable, student_ids, is_row, width, student_stride, ROWS, PIECE)
            y_scale = _inverse_norms(TeacherTable, teacher_ids, is_column, width, teacher_stride, COLUMNS, PIECE)
        total = tl.zeros([ROWS, COLUMNS], tl.float64)
        for start in range(0, width, PIECE):
            x = _vectors(StudentTable, student_ids, is_row, start, width, student_stride, PIECE)
            y = _vectors(TeacherTable, teacher_ids, is_column, start, width, teacher_stride, PIECE)
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
    return tl.where(is_row[:, None] & is_column[None, :], total, 0.0)


@triton.jit
def _evaluate(f, cost, is_row, a, b, unit_a, unit_b, stage):
    """P with exact columns at (f, stage), its row sums, D(f), and the largest |row sum - marginal| in units of it."""
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
def _newton_step(plan, rows, is_row, a, b_inverse, unit_a, error, STEPS: tl.constexpr):
    """H^-1 (a - rows) by conjugate gradients; what is reached so far where the steps run out or H does not curve upwards."""
    ridge = RIDGE * unit_a
    diagonal = tl.sum(plan * (1 - plan * b_inverse[None, :]), 1) + ridge
    scale = tl.where(is_row, 1 / diagonal, 0.0)
    residual = a - rows
    found = residual * 0
    direction = scale * residual
    size = tl.sum(residual * direction, 0)
    reduction = tl.minimum(tl.maximum(error, FINEST), COARSEST)
    goal = size * reduction * reduction
    left = STEPS
    while (left > 0) & (size > goal):
        columns = tl.sum(plan * direction[:, None], 0) * b_inverse
        product = (rows + ridge) * direction - tl.sum(plan * columns[None, :], 1)
        curvature = tl.sum(direction * product, 0)
        left -= 1
        if curvature > 0:
            length = size / curvature
            found += length * direction
            residual -= length * product
            next_size = tl.sum(scale * residual * residual, 0)
            direction = scale * residual + next_size / size * direction
            size = next_size
        else:
            left = 0
    return found


@triton.jit
def _solve(cost, is_row, a, b, unit_a, unit_b, spread, epsilon, max_iterations, tolerance, STEPS: tl.constexpr):
    """The student's potential. A pass evaluates f + size * step and takes it; a step of Newton's that it does not take is
    halved, or given up for a plain one."""
    b_inverse = tl.where(b > 0, 1 / unit_b, 0.0)
    f, step = a * 0, a * 0
    size, slope, before = unit_a * 0, unit_a * 0, unit_a * 0
    stage = tl.maximum(epsilon, spread)
    iterations, tried, halvings, phase = 0, 0, 0, PLAIN
    running = True
    while running:
        x = f + size * step
        plan, rows, dual, error = _evaluate(x, cost, is_row, a, b, unit_a, unit_b, stage)
        slack = 1e-15 * tl.abs(before)
        if cost.dtype != tl.float64:
            slack += DUAL_FLOAT32 * stage
        risen = dual - before >= ARMIJO * size * slope - slack
        if (phase == SEARCH) & ~risen:
            halvings += 1
            size = tl.where(halvings < MAX_HALVINGS, size / 2, 0.0)
            phase = tl.where(halvings < MAX_HALVINGS, SEARCH, GAVE_UP)
        else:
            f = x
            final = stage <= epsilon
            solved = (error <= tl.where(final, tolerance, STAGE_TOLERANCE)) & (phase <= SEARCH)
            spent = (iterations >= max_iterations) & (phase != GAVE_UP)
            if solved & ~final:
                stage = tl.maximum(stage / STAGE_FACTOR, epsilon)
                size = size * 0
                tried = 0
                phase = LOWERED
            elif solved | spent | (error != error):
                running = False
            else:
                step = stage * tl.where(is_row, tl.log(unit_a / tl.maximum(rows, 1e-300)), 0.0)
                size = size * 0 + 1
                if phase == GAVE_UP:
                    phase = PLAIN
                else:
                    phase = PLAIN
                    if tried >= STAGE_SINKHORN:
                        step = stage * _newton_step(plan, rows, is_row, a, b_inverse, unit_a, error, STEPS)
                        slope = tl.sum(step * (a - rows), 0)
                        before = dual
                        halvings = 0
                        phase = SEARCH
                    iterations += 1
                    tried += 1
    return f


@triton.jit
def _rounded(plan, rows, a, b):
    """The plan moved onto its marginals: rows and columns scaled down where they hold too much, the rest spread evenly."""
    plan = plan * tl.minimum(a / tl.maximum(rows, 1e-300), 1.0)[:, None]
    plan = plan * tl.minimum(b / tl.maximum(tl.sum(plan, 0), 1e-300), 1.0)[None, :]
    missing_a = tl.maximum(a - tl.sum(plan, 1), 0.0)
    missing_b = tl.maximum(b - tl.sum(plan, 0), 0.0)
    return plan + missing_a[:, None] * (missing_b / tl.maximum(tl.sum(missing_a, 0), 1e-300))[None, :]


@triton.jit
def _side(Ids, Lengths, problem, window, K: tl.constexpr):
    """Ids, which of them count, the marginal, and its unit, 1 / length in float64."""
    at = tl.arange(0, K)
    length = tl.load(Lengths + problem)
    valid = (at < length) & (at < window)
    ids = tl.load(Ids + problem * window + at, mask=valid, other=0)
    unit = 1 / length.to(tl.float64)
    return ids, valid, tl.where(valid, unit, 0.0), unit


@triton.jit(
    do_not_specialize=["student_window", "teacher_window", "max_iterations", "width", "student_stride", "teacher_stride"],
    do_not_specialize_on_alignment=["StudentIds", "TeacherIds", "StudentLengths", "TeacherLengths"],
)
def _transport(
    StudentTable, StudentIds, StudentLengths, TeacherTable, TeacherIds, TeacherLengths, Distance, Plan, MarginalError,
    student_window, teacher_window, width, student_stride, teacher_stride,
    epsilon: tl.float64, max_iterations, tolerance: tl.float64,
    COST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    student_ids, is_row, a, unit_a = _side(StudentIds, StudentLengths, problem, student_window, ROWS)
    teacher_ids, is_column, b, unit_b = _side(TeacherIds, TeacherLengths, problem, teacher_window, COLUMNS)
    is_entry = is_row[:, None] & is_column[None, :]
    cost = _costs(
        StudentTable, TeacherTable, student_ids, teacher_ids, is_row, is_column, width, student_stride, teacher_stride,
        COST, ROWS, COLUMNS, PIECE, Plan.dtype.element_ty,
    )  # fmt: skip
    spread = tl.max(tl.max(cost, 1), 0) - tl.min(tl.min(tl.where(is_entry, cost, float("inf")), 1), 0)
    epsilon = number(epsilon, tl.float64)
    if COST == SQEUCLIDEAN:
        epsilon *= tl.maximum(tl.sum(tl.sum(cost, 1), 0) * unit_a * unit_b, 1e-12)

    f = _solve(cost, is_row, a, b, unit_a, unit_b, spread, epsilon, max_iterations, number(tolerance, tl.float64), 2 * ROWS)

    plan, rows, _, error = _evaluate(f, cost, is_row, a, b, unit_a, unit_b, epsilon)
    plan = _rounded(plan, rows, a, b)
    plan = tl.where(is_entry & (cost + error != cost + error), error, plan)  # a problem without a solution has none anywhere
    tl.store(Distance + problem, tl.sum(tl.sum(plan * cost, 1), 0))
    tl.store(MarginalError + problem, error)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    held = (row < student_window) & (column < teacher_window)
    tl.store(Plan + (problem * student_window + row) * teacher_window + column, plan, mask=held)


def block_of(window: int) -> int:
    """Entries that a program holds of a window of this many."""
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"windows must hold 1 to {MAX_WINDOW} tokens on a GPU, got {window}")
    return max(16, triton.next_power_of_2(window))


def warps_of(block: int) -> int:
    """Sixteen entries of the largest plan a thread, which leaves its float64 tiles in registers."""
    return max(2, block * block // 512)


def launches(
    student_table: Tensor,
    student_ids: Tensor,
    student_lengths: Tensor,
    teacher_table: Tensor,
    teacher_ids: Tensor,
    teacher_lengths: Tensor,
    cost: str,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launch, and (distance [m], plan [m, K_S, K_T], marginal_error [m]), which it fills; float64 where a table is, else
    float32."""
    if cost not in COSTS:
        raise ValueError(f"cost must be one of {', '.join(COSTS)}, got {cost!r}")
    problems, student_window = student_ids.shape
    teacher_window = teacher_ids.shape[1]
    block = block_of(max(student_window, teacher_window))
    student_table, teacher_table = (x if x.stride(1) == 1 else x.contiguous() for x in (student_table, teacher_table))
    dtype = torch.promote_types(torch.promote_types(student_table.dtype, teacher_table.dtype), torch.float32)
    distance = student_table.new_empty(problems, dtype=dtype)
    plan = student_table.new_empty(problems, student_window, teacher_window, dtype=dtype)
    marginal_error = torch.empty_like(distance)
    arguments = {
        "StudentTable": student_table,
        "StudentIds": student_ids.contiguous(),
        "StudentLengths": student_lengths.contiguous(),
        "TeacherTable": teacher_table,
        "TeacherIds": teacher_ids.contiguous(),
        "TeacherLengths": teacher_lengths.contiguous(),
        "Distance": distance,
        "Plan": plan,
        "MarginalError": marginal_error,
        "student_window": student_window,
        "teacher_window": teacher_window,
        "width": student_table.shape[1],
        "student_stride": student_table.stride(0),
        "teacher_stride": teacher_table.stride(0),
        "epsilon": epsilon,
        "max_iterations": max_iterations,
        "tolerance": tolerance,
    }
    constants = {"COST": COSTS.index(cost), "ROWS": block, "COLUMNS": block, "PIECE": 4}
    launch = Launch(_transport, (problems,), arguments, constants, warps_of(block))
    return [launch], (distance, plan, marginal_error)


def transport(
    student_table: Tensor,
    student_ids: Tensor,
    student_lengths: Tensor,
    teacher_table: Tensor,
    teacher_ids: Tensor,
    teacher_lengths: Tensor,
    cost: str,
    epsilon: float,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """topd::transport; arguments and results are its schema's."""
    student, teacher = (student_table, student_ids, student_lengths), (teacher_table, teacher_ids, teacher_lengths)
    found, outputs = launches(*student, *teacher, cost, epsilon, max_iterations, tolerance)
    run_all(found)
    return outputs
