"""The contenders, a file each: topd ("ours"), eager torch, TRL, Liger, POT (transport.py), and the floor of bare products.

A library's file has `installed()`, `offers(workload)`, whether it is installed and knows the loss on that device, and
`loss(workload)`, nats [N] with a graph behind them, or [] where the library gives the mean alone. Libraries are imported when
they are first called.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from topd.options import BackendName
from topd_bench.losses import Gradients, Workload, gradients_of_mean
from topd_bench.peers import eager, liger, ours, trl

LIBRARIES = {"trl": trl, "liger": liger}
CONTENDERS = ("ours", "eager", *LIBRARIES)
Differentiable = Callable[[], Gradients]


def _gradients(loss: Callable[[], Tensor], workload: Workload) -> Gradients:
    return gradients_of_mean(loss(), workload.inputs)


def gradients_of(loss: Callable[[], Tensor], workload: Workload) -> Differentiable:
    """Return what computes a loss [N] and its gradients."""
    return partial(_gradients, loss, workload)


def differentiable(workload: Workload, backend: BackendName | None, *, compiled: bool = False) -> dict[str, Differentiable]:
    """Return the contenders that compute a loss and its gradients, by name.

    Args:
        backend: topd's; None is the device's default.
        compiled: whether "torch.compile", the eager code compiled, is among them.
    """
    contenders: dict[str, Differentiable] = {
        "ours": gradients_of(partial(ours.loss, workload, backend), workload),
        "eager": partial(eager.gradients, workload),
    }
    if compiled:
        contenders["torch.compile"] = gradients_of(eager.compiled(workload), workload)
    for name, library in LIBRARIES.items():
        if library.offers(workload):
            contenders[name] = gradients_of(partial(library.loss, workload), workload)
    return contenders
