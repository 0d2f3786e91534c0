"""Exact optimal transport between windows, one pair after another on the CPU, by scipy and POT."""

import importlib
from typing import Any

import torch
from torch import Tensor

from topd.ops.transport.eager import cost_matrix
from topd.ops.transport.spec import WindowSide

# Pairs whose costs are formed together.
PIECE = 64


def _solver(package: str, module: str) -> Any:
    """Import a module of a package that only this solver needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = 'pip install "topd[transport]"'
        raise ImportError(f"solver='exact' needs {package} for these windows, which is not installed: {extra}") from error


def exact_transport(student: WindowSide, teacher: WindowSide, cost: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return distance [m], plan [m, K_S, K_T] and marginal_error [m] (0), float32 (float64 where a table is), on the windows'
    device."""
    device = student.ids.device
    dtype = torch.promote_types(torch.promote_types(student.table.dtype, teacher.table.dtype), torch.float32)
    m, shape = student.ids.shape[0], (student.ids.shape[1], teacher.ids.shape[1])
    distance, plan = torch.zeros(m, dtype=torch.float64), torch.zeros(m, *shape, dtype=torch.float64)
    sizes = list(zip(student.lengths.tolist(), teacher.lengths.tolist(), strict=True))
    for start in range(0, m, PIECE):
        costs = cost_matrix(student, teacher, cost, slice(start, start + PIECE)).cpu()
        for offset, matrix in enumerate(costs):
            rows, columns = sizes[start + offset]
            if not matrix.isfinite().all():
                raise ValueError(
                    f"embedding, or the vectors, must be finite within the windows' lengths, got a NaN or inf in window "
                    f"{start + offset}; the exact solver cannot rank its costs"
                )
            solved = _solve(matrix[:rows, :columns])
            plan[start + offset, :rows, :columns] = solved
            distance[start + offset] = (solved * matrix[:rows, :columns]).sum()
    error = torch.zeros(m, dtype=dtype, device=device)
    return distance.to(device, dtype), plan.to(device, dtype), error


def _solve(cost: Tensor) -> Tensor:
    """Return the plan of one pair: an assignment where the windows are equally long, a linear program otherwise."""
    rows, columns = cost.shape
    if rows == columns:
        optimize = _solver("scipy", "scipy.optimize")
        plan = torch.zeros_like(cost)
        plan[optimize.linear_sum_assignment(cost.numpy())] = 1.0 / rows
        return plan
    ot = _solver("POT", "ot")
    uniform = [torch.full((size,), 1.0 / size, dtype=torch.float64).numpy() for size in (rows, columns)]
    return torch.from_numpy(ot.emd(*uniform, cost.contiguous().numpy(), numItermax=1_000_000))
