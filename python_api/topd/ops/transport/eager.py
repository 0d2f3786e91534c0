"""topd::transport in eager torch: entropic optimal transport between m pairs of short windows.

    minimise  <P, C> + epsilon sum P (log P - 1)   over P >= 0, row sums a (student, 1 / K_S), column sums b (teacher, 1 / K_T)

In the log domain, with the columns always exact: P_ij = b_j softmax_i((f_i - C_ij) / epsilon), f the student's potential. a
minus its row sums r is the gradient of the concave semi-dual D(f) = <a, f> + <b, g(f)>, whose Hessian is
-(diag(r) - P diag(1/b) Pᵀ) / epsilon. Plain Sinkhorn iterations, f += epsilon log(a / r), need hundreds at epsilon = 0.05 and
ten thousand at 0.001; here epsilon is lowered from the spread of the costs to its value, by a factor of 4, two such iterations
at each, and Newton steps with a line search on D where they do not suffice: some ten in all at 0.05, twenty-five at 0.001. In
the end the plan is rounded onto its marginals (Altschuler, Weed, Rigollet 2017), so that its distance <P, C>, without the
entropy, is never below the exact one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.ops.shared.engines import eager_kernel
from topd.ops.transport.spec import INPUTS, Outputs, WindowSide

# From one epsilon to the next; what an intermediate one is solved to, in units of a marginal; the Sinkhorn iterations that it
# gets before Newton steps.
STAGE_FACTOR, STAGE_TOLERANCE, STAGE_SINKHORN = 4, 0.1, 2
# Entries of a side's vectors that are gathered at a time.
PIECE = 4 << 20
RIDGE = 1e-6  # of a marginal, on the Hessian
ARMIJO, MAX_HALVINGS = 1e-4, 20


def cost_matrix(student: WindowSide, teacher: WindowSide, cost: str, pairs: slice) -> Tensor:
    """Return C [m', K_S, K_T] in float64 of the chosen pairs; 0 past the lengths. A zero vector has cosine 0."""
    if cost == "mismatch":
        costs = (student.ids[pairs].unsqueeze(-1) != teacher.ids[pairs].unsqueeze(-2)).double()
    else:
        x, y = student.vectors(pairs), teacher.vectors(pairs)
        if cost == "cosine":
            x, y = _unit(x), _unit(y)
            costs = (1 - (x @ y.transpose(-1, -2)).double()).clamp_min(0.0)
        else:
            costs = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").double().square()
    return costs * (student.valid[pairs].unsqueeze(-1) & teacher.valid[pairs].unsqueeze(-2))


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1. Norms are taken in float64: the squares of float32 may leave its range. A zero vector stays
    one."""
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=torch.float64).to(vectors.dtype)
    return vectors / norm.masked_fill(norm == 0, 1.0)


def marginals(side: WindowSide) -> Tensor:
    """Return [m, K] float64: 1 / length, 0 past it."""
    return side.valid.double() / side.lengths.clamp_min(1).unsqueeze(-1)


class Plans(NamedTuple):
    """P with exact columns at (f, epsilon), its row sums, D(f), and the largest |row sum - marginal| in units of it."""

    plan: Tensor
    rows: Tensor
    dual: Tensor
    error: Tensor


def _plans(f: Tensor, cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Plans:
    scaled = ((f.unsqueeze(-1) - cost) / epsilon[:, None, None]).masked_fill((a == 0).unsqueeze(-1), -torch.inf)
    lse = scaled.logsumexp(1, keepdim=True)
    plan = (scaled - lse).exp() * b.unsqueeze(1)
    rows = plan.sum(-1)
    g = epsilon.unsqueeze(-1) * (b.masked_fill(b == 0, 1.0).log() - lse[:, 0])
    error = ((rows - a) / a.amax(-1, keepdim=True)).abs().amax(-1)
    return Plans(plan, rows, (a * f).sum(-1) + (b * g).sum(-1), error)


def _newton_step(now: Plans, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
    """Return epsilon H^-1 (a - r); H is made regular by a ridge, and by 11ᵀ along the direction that changes nothing."""
    unit = a.amax(-1)[:, None, None]
    hessian = torch.diag_embed(now.rows + (a == 0)) - (now.plan / b.masked_fill(b == 0, 1.0).unsqueeze(1)) @ now.plan.mT
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    valid = (a != 0).to(a.dtype)
    hessian = hessian + RIDGE * unit * eye + unit * unit * valid.unsqueeze(-1) * valid.unsqueeze(-2)
    factor, info = torch.linalg.cholesky_ex(hessian)
    step = torch.cholesky_solve((a - now.rows).unsqueeze(-1), factor)[..., 0] * epsilon.unsqueeze(-1)
    return step.masked_fill((info != 0).unsqueeze(-1), torch.nan)


def sinkhorn(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return plans [m, K_S, K_T] with exact columns, and the largest |row sum - marginal| of each in units of the marginal."""
    low = cost.masked_fill((a == 0).unsqueeze(-1) | (b == 0).unsqueeze(1), torch.inf).amin((1, 2))
    stage = torch.maximum(epsilon, cost.amax((1, 2)) - low)
    f = torch.zeros_like(a)
    tried = torch.zeros_like(epsilon)
    now = _plans(f, cost, a, b, stage)
    for _ in range(max_iterations):
        final = stage <= epsilon
        solved = now.error <= torch.where(final, tolerance, STAGE_TOLERANCE)
        if bool((final & solved).all()):
            break
        down = solved & ~final
        stage = torch.where(down, torch.maximum(stage / STAGE_FACTOR, epsilon), stage)
        tried = torch.where(down, 0.0, tried)
        active = ~(final & solved)
        now = _plans(f, cost, a, b, stage)
        log_ratio = (a.masked_fill(a == 0, 1.0) / now.rows.masked_fill(a == 0, 1.0).clamp_min(1e-300)).log()
        plain = stage.unsqueeze(-1) * log_ratio
        step = plain
        newton = active & (tried >= STAGE_SINKHORN)
        if bool(newton.any()):
            step = torch.where(newton.unsqueeze(-1), _newton_step(now, a, b, stage), plain)
            step = _searched(step, plain, f, now, cost, a, b, stage)
        f = torch.where(active.unsqueeze(-1), f + step, f)
        tried = tried + 1
        now = _plans(f, cost, a, b, stage)
    if bool((stage > epsilon).any()):  # out of iterations: what is left at the epsilon that was asked for
        now = _plans(f, cost, a, b, epsilon)
    return now.plan, now.error


def _searched(step: Tensor, plain: Tensor, f: Tensor, now: Plans, cost: Tensor, a: Tensor, b: Tensor, stage: Tensor) -> Tensor:
    """Return the step, halved until D rises enough; the plain one where it never does."""
    slope = (step * (a - now.rows)).sum(-1)
    size = torch.ones_like(slope)
    for _ in range(MAX_HALVINGS):
        risen = _plans(f + size.unsqueeze(-1) * step, cost, a, b, stage).dual - now.dual
        short = ~(risen >= ARMIJO * size * slope - 1e-15 * now.dual.abs())
        if not bool(short.any()):
            break
        size = torch.where(short, size / 2, size)
    good = (~short).unsqueeze(-1)
    return torch.where(good, size.unsqueeze(-1) * step, plain)


def rounded(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the plan moved onto its marginals: rows and columns scaled down where they hold too much, the rest spread
    evenly."""
    plan = plan * (a / plan.sum(-1).clamp_min(1e-300)).clamp_max(1.0).unsqueeze(-1)
    plan = plan * (b / plan.sum(-2).clamp_min(1e-300)).clamp_max(1.0).unsqueeze(-2)
    missing_a, missing_b = (a - plan.sum(-1)).clamp_min(0.0), (b - plan.sum(-2)).clamp_min(0.0)
    total = missing_a.sum(-1).clamp_min(1e-300)
    return plan + missing_a.unsqueeze(-1) * missing_b.unsqueeze(-2) / total[:, None, None]


def transport(
    student: WindowSide, teacher: WindowSide, cost: str, epsilon: float, *, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return distance [m], plan [m, K_S, K_T], marginal_error [m] in float64."""
    rows = max(1, PIECE // (max(student.ids.shape[1], teacher.ids.shape[1]) * student.table.shape[1]))
    pieces = [slice(start, start + rows) for start in range(0, student.ids.shape[0], rows)] or [slice(None)]
    matrix = torch.cat([cost_matrix(student, teacher, cost, piece) for piece in pieces])
    a, b = marginals(student), marginals(teacher)
    epsilons = torch.full_like(a[:, 0], epsilon)
    if cost == "sqeuclidean":
        counted = (student.lengths * teacher.lengths).clamp_min(1)
        epsilons = epsilons * (matrix.sum((1, 2)) / counted).clamp_min(1e-12)
    plan, error = sinkhorn(matrix, a, b, epsilons, max_iterations=max_iterations, tolerance=tolerance)
    plan = rounded(plan, a, b)
    return (plan * matrix).sum((1, 2)), plan, error


@eager_kernel("transport")
def _kernel(*flat: Any) -> Outputs:
    student, teacher, cost, epsilon, max_iterations, tolerance = inputs = INPUTS.unpack(*flat)
    distance, plan, error = transport(student, teacher, cost, epsilon, max_iterations=max_iterations, tolerance=tolerance)
    return Outputs(distance.to(inputs.dtype), plan.to(inputs.dtype), error.to(inputs.dtype))
