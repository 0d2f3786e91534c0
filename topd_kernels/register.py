"""Register the launchers with the dispatcher for CUDA tensors, which are ROCm's as well, when this is imported."""

from collections.abc import Callable

import torch

from topd_kernels.divergence_rows.launches import divergence_rows
from topd_kernels.divergence_rows.statistics import statistics
from topd_kernels.logprob_rows.launches import logprob_rows
from topd_kernels.scaled_rows.launches import scaled_rows
from topd_kernels.shared import launch
from topd_kernels.transport.launches import transport
from topd_kernels.weighted_gather.launches import weighted_gather
from topd_kernels.weighted_scatter.launches import weighted_scatter

LAUNCHERS: dict[str, Callable[..., object]] = {
    "divergence_rows": divergence_rows,
    "logprob_rows": logprob_rows,
    "scaled_rows": scaled_rows,
    "transport": transport,
    "weighted_gather": weighted_gather,
    "weighted_scatter": weighted_scatter,
}

for _op, _launcher in LAUNCHERS.items():
    torch.library.impl(f"topd::{_op}", "CUDA", _launcher)


def interpreted() -> bool:
    """Tell whether the kernels run in Triton's interpreter."""
    return launch.interpreted(statistics)
