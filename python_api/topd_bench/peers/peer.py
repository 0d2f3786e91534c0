"""What a peer is: one way to compute a loss and its gradients, and the words for why it cannot."""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from topd.options import BackendName
from topd_bench.losses import Gradients, Workload, gradients_of_mean

Differentiable = Callable[[], Gradients]
Loss = Callable[[Workload, BackendName | None], Tensor]
UNKNOWN = "it does not know this loss"


class Refusal(Protocol):
    """A function that says why a peer cannot compute a workload; empty where it can."""

    def __call__(self, workload: Workload) -> str: ...


def always(workload: Workload) -> str:
    """Refuse nothing."""
    return ""


class Peer(NamedTuple):
    """One system that is measured.

    Attributes:
        contender: returns what computes value and gradients of a workload; the backend is topd's, None for the device's own.
        refusal: says why it cannot compute a workload on its device; empty where it can.
    """

    contender: Callable[[Workload, BackendName | None], Differentiable]
    refusal: Refusal = always


def of_loss(loss: Loss, refusal: Refusal = always) -> Peer:
    """Return the peer of a function that computes nats [N], or their mean [], with a graph behind them."""

    def contender(workload: Workload, backend: BackendName | None) -> Differentiable:
        return lambda: gradients_of_mean(loss(workload, backend), workload.inputs)

    return Peer(contender, refusal)


def not_installed(package: str, distribution: str) -> str:
    """Say that a package is missing and how to install it; empty where it is there."""
    return "" if importlib.util.find_spec(package) else f"not installed: pip install {distribution}"
