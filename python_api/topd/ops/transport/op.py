"""topd::transport, optimal transport between m pairs of short windows: gather, cost, Sinkhorn, distance, plan in one launch.

Read per problem: the K_S + K_T rows of the tables that its windows name. Written: a distance, an error, a plan. The costs and
the iterates stay in cache or registers. The math is that of `topd.ops.transport.eager`, which runs wherever no compiled kernel
does. Inputs are constants.
"""

import torch
from torch import Tensor

from topd.backends import kernel
from topd.ops.transport.eager import WindowSide, transport

torch.library.define(
    "topd::transport",
    "(Tensor student_table, Tensor student_ids, Tensor student_lengths, Tensor teacher_table, Tensor teacher_ids, "
    "Tensor teacher_lengths, str cost, float epsilon, int max_iterations, float tolerance) -> "
    "(Tensor distance, Tensor plan, Tensor marginal_error)",
)


# The longest window of the Triton kernels; the reference solves longer ones.
TRITON_WINDOW = 128


@torch.library.register_fake("topd::transport")
def _fake(
    student_table: Tensor, student_ids: Tensor, student_lengths: Tensor, teacher_table: Tensor, teacher_ids: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student_table.dtype, teacher_table.dtype), torch.float32)
    m, k_student = student_ids.shape
    shapes = ((m,), (m, k_student, teacher_ids.shape[1]), (m,))
    distance, plan, error = (student_table.new_empty(shape, dtype=dtype) for shape in shapes)
    return distance, plan, error


def run_transport(
    backend: str,
    student: WindowSide,
    teacher: WindowSide,
    cost: str,
    epsilon: float,
    *,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """distance [m], plan [m, K_S, K_T], marginal_error [m], float32 (float64 where a table is)."""
    numbers = (cost, epsilon, max_iterations, tolerance)
    longest = max(student.ids.shape[1], teacher.ids.shape[1])
    if backend == "cpp" or (backend == "triton" and longest <= TRITON_WINDOW):
        distance, plan, error = kernel("transport", backend, student.ids.device)(*student, *teacher, *numbers)
        return distance, plan, error
    dtype = torch.promote_types(torch.promote_types(student.table.dtype, teacher.table.dtype), torch.float32)
    found = transport(student, teacher, cost, epsilon, max_iterations=max_iterations, tolerance=tolerance)
    distance, plan, error = (part.to(dtype) for part in found)
    return distance, plan, error
