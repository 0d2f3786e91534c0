"""The kernels of transport: one problem a program, costs and plan in registers or, of larger windows, in scratch.

The definition of the math, and the names, are those of python_api/topd/ops/transport/eager.py. What differs:

- the Newton system H v = a - r, H = diag(r) - P diag(1/b) Pᵀ, is solved by conjugate gradients with H's diagonal as
  preconditioner, so that the plan is all that a product with H needs. H is singular along the ones, to which a - r is
  orthogonal; the ridge can then be 1e-10 of a marginal, and a tolerance of 1e-9 takes tens of iterations rather than
  hundreds. A system is solved to the error of its plan, at most 0.1: one to ten steps at usual tolerances;
- the iteration is a loop of single passes, each an evaluation of the plan at f + size * step and what follows from it, so that
  the binary holds two copies of the evaluation (the other is the final one) and no plan lives from one pass to the next.

Precision: vectors, plans, sums, potentials and costs in float64. Products of table entries in the tables' float (16-bit:
float32), their sums in float64, in pieces of PIECE entries; COMPENSATED: in two float32 instead.
"""

import triton
import triton.language as tl

from topd_kernels.shared.records import numbered
from topd_kernels.shared.row_math import number
from topd_kernels.transport.costs import SQEUCLIDEAN, costs, inverse_norms, side
from topd_kernels.transport.panels import coupled_panels, curvatures_panels, evaluate_panels, store_costs, store_rounded
from topd_kernels.transport.tile import coupled, curvatures, evaluate, rounded

STAGE_FACTOR, STAGE_TOLERANCE, STAGE_SINKHORN = tl.constexpr(4.0), tl.constexpr(0.1), tl.constexpr(2)
RIDGE = tl.constexpr(1e-10)  # of a marginal, on the Hessian
ARMIJO, MAX_HALVINGS = tl.constexpr(1e-4), tl.constexpr(20)
# What the pass evaluates: a plain step, a step of Newton's, the same f at a lower stage, f again after a search in vain.
PLAIN, SEARCH, LOWERED, GAVE_UP = numbered(4)
# What conjugate gradients solve a Newton system to: the plan's error, within these.
COARSEST, FINEST = tl.constexpr(0.1), tl.constexpr(1e-6)


@triton.jit
def _newton_step(
    plan, rows, is_row, a, b_inverse, unit_a, error, columns, ROWS: tl.constexpr, PANEL: tl.constexpr
):  # fmt: skip
    """Return H^-1 (a - rows), by conjugate gradients; what is reached so far where the steps run out or H does not curve
    upwards."""
    ridge = RIDGE * unit_a
    if PANEL == 0:
        diagonal = curvatures(plan, b_inverse) + ridge
    else:
        diagonal = curvatures_panels(plan, rows, b_inverse, columns, ROWS, PANEL) + ridge
    scale = tl.where(is_row, 1 / diagonal, 0.0)
    residual = a - rows
    solution = residual * 0
    direction = scale * residual
    size = tl.sum(residual * direction, 0)
    reduction = tl.minimum(tl.maximum(error, FINEST), COARSEST)
    goal = size * reduction * reduction
    left = 2 * ROWS
    while (left > 0) & (size > goal):
        if PANEL == 0:
            product = (rows + ridge) * direction - coupled(plan, direction, b_inverse)
        else:
            product = (rows + ridge) * direction - coupled_panels(plan, direction, b_inverse, columns, ROWS, PANEL)
        curvature = tl.sum(direction * product, 0)
        left -= 1
        if curvature > 0:
            length = size / curvature
            solution += length * direction
            residual -= length * product
            next_size = tl.sum(scale * residual * residual, 0)
            direction = scale * residual + next_size / size * direction
            size = next_size
        else:
            left = 0
    return solution


@triton.jit
def _solve(
    cost, Plan, is_row, a, b, unit_a, unit_b, columns, spread, epsilon, max_iterations, tolerance,
    ROWS: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Return the student's potential. A pass evaluates f + size * step and takes it; a step of Newton's that it does not take
    is halved, or given up for a plain one. By panels (PANEL > 0) `cost` and `Plan` are scratch; else the cost is a tile."""
    b_inverse = tl.where(b > 0, 1 / unit_b, 0.0)
    f, step = a * 0, a * 0
    size, slope, before = unit_a * 0, unit_a * 0, unit_a * 0
    stage = tl.maximum(epsilon, spread)
    iterations, tried, halvings, phase = 0, 0, 0, PLAIN
    running = True
    while running:
        x = f + size * step
        if PANEL == 0:
            plan, rows, dual, error = evaluate(x, cost, is_row, a, b, unit_a, unit_b, stage)
        else:
            plan = Plan
            rows, dual, error = evaluate_panels(x, cost, Plan, is_row, a, unit_a, unit_b, columns, stage, ROWS, PANEL)
        risen = dual - before >= size * ARMIJO * slope - 1e-15 * tl.abs(before)
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
                        step = stage * _newton_step(plan, rows, is_row, a, b_inverse, unit_a, error, columns, ROWS, PANEL)
                        slope = tl.sum(step * (a - rows), 0)
                        before = dual
                        halvings = 0
                        phase = SEARCH
                    iterations += 1
                    tried += 1
    return f


_BY_VALUE = ["student_window", "teacher_window", "max_iterations", "width", "student_stride", "teacher_stride"]
_UNALIGNED = ["StudentIds", "TeacherIds", "StudentLengths", "TeacherLengths"]


@triton.jit(do_not_specialize=_BY_VALUE, do_not_specialize_on_alignment=_UNALIGNED)
def transport(
    StudentTable, StudentIds, StudentLengths, TeacherTable, TeacherIds, TeacherLengths, Distance, Plan, MarginalError,
    student_window, teacher_window, width, student_stride, teacher_stride,
    epsilon: tl.float64, max_iterations, tolerance: tl.float64,
    COST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, COMPENSATED: tl.constexpr,
):  # fmt: skip
    """Solve one problem, the costs a tile."""
    problem = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    student_ids, is_row, a, unit_a = side(StudentIds, StudentLengths, problem, student_window, row)
    teacher_ids, is_column, b, unit_b = side(TeacherIds, TeacherLengths, problem, teacher_window, column)
    is_entry = is_row[:, None] & is_column[None, :]
    x_powers, x_scale = inverse_norms(StudentTable, student_ids, is_row, width, student_stride, COST, ROWS, PIECE, COMPENSATED)
    y_powers, y_scale = inverse_norms(
        TeacherTable, teacher_ids, is_column, width, teacher_stride, COST, COLUMNS, PIECE, COMPENSATED
    )
    cost = costs(
        StudentTable, TeacherTable, student_ids, teacher_ids, is_row, is_column, x_powers, y_powers, x_scale, y_scale, width,
        student_stride, teacher_stride, COST, ROWS, COLUMNS, PIECE, Plan.dtype.element_ty, COMPENSATED,
    )  # fmt: skip
    spread = tl.max(tl.max(cost, 1), 0) - tl.min(tl.min(tl.where(is_entry, cost, float("inf")), 1), 0)
    epsilon = number(epsilon, tl.float64)
    if COST == SQEUCLIDEAN:
        epsilon *= tl.maximum(tl.sum(tl.sum(cost, 1), 0) * unit_a * unit_b, 1e-12)
    tolerance = number(tolerance, tl.float64)

    f = _solve(cost, Plan, is_row, a, b, unit_a, unit_b, COLUMNS, spread, epsilon, max_iterations, tolerance, ROWS, 0)

    plan, rows, _, error = evaluate(f, cost, is_row, a, b, unit_a, unit_b, epsilon)
    plan = rounded(plan, rows, a, b)
    plan = tl.where(is_entry & (cost + error != cost + error), error, plan)  # a problem without a solution has none anywhere
    tl.store(Distance + problem, tl.sum(tl.sum(plan * cost, 1), 0))
    tl.store(MarginalError + problem, error)
    held = (row < student_window)[:, None] & (column < teacher_window)[None, :]
    tl.store(Plan + (problem * student_window + row[:, None]) * teacher_window + column[None, :], plan, mask=held)


@triton.jit(do_not_specialize=[*_BY_VALUE, "problems"], do_not_specialize_on_alignment=_UNALIGNED)
def transport_panels(
    StudentTable, StudentIds, StudentLengths, TeacherTable, TeacherIds, TeacherLengths, Distance, Plan, MarginalError, Scratch,
    student_window, teacher_window, width, student_stride, teacher_stride,
    epsilon: tl.float64, max_iterations, tolerance: tl.float64, problems,
    COST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PANEL: tl.constexpr, PIECE: tl.constexpr,
    COMPENSATED: tl.constexpr,
):  # fmt: skip
    """Solve every num_programs-th problem, costs and plan in this program's two matrices of Scratch [programs, 2, COLUMNS,
    ROWS]."""
    program = tl.program_id(0).to(tl.int64)
    Cost = Scratch + program * (2 * ROWS * COLUMNS)
    Entropic = Cost + ROWS * COLUMNS
    tolerance = number(tolerance, tl.float64)
    for later in range(0, problems - tl.program_id(0), tl.num_programs(0)):
        problem = program + later
        student_ids, is_row, a, unit_a = side(StudentIds, StudentLengths, problem, student_window, tl.arange(0, ROWS))
        columns = tl.minimum(tl.load(TeacherLengths + problem), teacher_window).to(tl.int32)
        unit_b = 1 / columns.to(tl.float64)
        total, spread = store_costs(
            Cost, StudentTable, TeacherTable, TeacherIds, TeacherLengths, problem, student_ids, is_row, teacher_window, columns,
            width, student_stride, teacher_stride, COST, ROWS, PANEL, PIECE, Plan.dtype.element_ty, COMPENSATED,
        )  # fmt: skip
        least = number(epsilon, tl.float64)
        if COST == SQEUCLIDEAN:
            least *= tl.maximum(total * unit_a * unit_b, 1e-12)

        f = _solve(
            Cost, Entropic, is_row, a, unit_b, unit_a, unit_b, columns, spread, least, max_iterations, tolerance, ROWS, PANEL
        )  # fmt: skip

        rows, _, error = evaluate_panels(f, Cost, Entropic, is_row, a, unit_a, unit_b, columns, least, ROWS, PANEL)
        distance = store_rounded(
            Plan, problem, Entropic, Cost, is_row, rows, a, unit_b, error, columns, student_window, teacher_window, ROWS, PANEL,
        )  # fmt: skip
        tl.store(Distance + problem, distance)
        tl.store(MarginalError + problem, error)
