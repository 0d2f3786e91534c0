"""The eager code under torch.compile, with its shapes fixed."""

from collections.abc import Callable

import torch
from torch import Tensor

from topd.options import BackendName
from topd_bench.losses import Gradients, Workload, gradients_of_mean
from topd_bench.peers.eager import loss_of
from topd_bench.peers.peer import Differentiable, Peer


def contender(workload: Workload, backend: BackendName | None) -> Differentiable:
    """Return what computes value and gradients, not compiled yet: the first call does it."""
    torch.compiler.reset()  # after eight variants torch would run eager code in silence
    function: Callable[..., Tensor] = torch.compile(loss_of, dynamic=False)

    def gradients() -> Gradients:
        return gradients_of_mean(function(workload.loss, *workload.sides, *workload.targets), workload.inputs)

    return gradients


PEER = Peer(contender)
