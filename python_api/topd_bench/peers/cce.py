"""Apple's ml-cross-entropy (the distribution cut-cross-entropy): the cross-entropy of one token a row, in Triton."""

import torch
from torch import Tensor

from topd.options import BackendName
from topd_bench.losses import Workload
from topd_bench.peers.peer import UNKNOWN, not_installed, of_loss


def refusal(workload: Workload) -> str:
    if not workload.one_token:
        return UNKNOWN
    if workload.inputs.device.type == "cpu":
        return "needs a GPU"
    return not_installed("cut_cross_entropy", "cut-cross-entropy")


def loss(workload: Workload, backend: BackendName | None) -> Tensor:
    """Return nats [N]."""
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, *_ = workload.sides
    return torch.as_tensor(linear_cross_entropy(hidden, weight, workload.targets.ids[:, 0], reduction="none"))


PEER = of_loss(loss, refusal)
