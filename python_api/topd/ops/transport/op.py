"""topd::transport, optimal transport between m pairs of short windows: gather, cost, Sinkhorn, distance, plan in one launch.

Read per problem: the K_S + K_T rows of the tables that its windows name. Written: a distance, an error, a plan. The costs and
the iterates stay in cache or registers. The math is that of `topd.ops.transport.eager`, which runs wherever no compiled kernel
does. Inputs are constants.
"""

from typing import Any

import torch

import topd.ops.transport.eager  # noqa: F401  (registers what the backend "eager" runs)
from topd.ops.shared.engines import engine_of
from topd.ops.shared.op_body import define, refuse_capture
from topd.ops.transport.spec import INPUTS, OUTPUTS, Inputs, Outputs, WindowSide
from topd.products import exact_products

define("topd::transport", f"({INPUTS.schema}) -> ({OUTPUTS.schema})")


@torch.library.register_fake("topd::transport")
def _fake(*flat: Any) -> tuple[Any, ...]:
    inputs = INPUTS.unpack(*flat)
    ids, dtype = inputs.student.ids, inputs.dtype
    (m, k_student), (_, k_teacher) = ids.shape, inputs.teacher.ids.shape
    sizes = ((m,), (m, k_student, k_teacher), (m,))
    return tuple(inputs.student.table.new_empty(size, dtype=dtype) for size in sizes)


def run_transport(
    backend: str, student: WindowSide, teacher: WindowSide, cost: str, epsilon: float, *, max_iterations: int, tolerance: float
) -> Outputs:
    """Return distance [m], plan [m, K_S, K_T], marginal_error [m], float32 (float64 where a table is). WindowSide hold at most
    MAX_WINDOW tokens."""
    device = student.ids.device
    refuse_capture("near_future_divergence", device)
    kernel = engine_of(backend).kernel("transport", device)
    with exact_products(device):
        return Outputs(*kernel(*INPUTS.pack(Inputs(student, teacher, cost, epsilon, max_iterations, tolerance))))
