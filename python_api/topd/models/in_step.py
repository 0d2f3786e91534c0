"""Processes that shard a model by FSDP2 gather each layer together: each must make as many forwards as the others.

Where the number depends on what was sampled (windows, rollouts that end early) a process that is done goes on with forwards of
one token until all are done. Their results count for nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from topd.models.fsdp2_state import groups_of
from topd.ops.shared.collectives import outcomes


class InStep:
    """What the forwards that count for nothing leave behind.

    Attributes:
        zero: 0, with the graph of those forwards behind it where gradients are enabled: added to the loss it makes their
            backward passes as many as the others'.
    """

    zero: Tensor | float = 0.0


@contextmanager
def in_step(module: nn.Module, forward: Callable[[Tensor], Any]) -> Iterator[InStep]:
    """Make a process call a module's forward as often as the process that calls it most often in its own such block.

    Every process that shares the model enters the block, also one that has nothing to do. Without FSDP2, or in one process, it
    does nothing. After an error the other processes are not waited for.

    Args:
        module: whose calls count; what FSDP2 shards is in it.
        forward: a call of the module on input_ids [1, 1] which returns a tensor.
    """
    step, groups = InStep(), _groups_of(module)
    if not groups:
        yield step
        return
    device = next(module.parameters()).device

    def go_on(*_: Any) -> None:
        _anyone(groups, True, device)

    handle = module.register_forward_pre_hook(go_on, prepend=True)
    try:
        yield step
    finally:
        handle.remove()
    while _anyone(groups, False, device):
        states = forward(torch.zeros(1, 1, dtype=torch.int64, device=device))
        step.zero = step.zero + 0.0 * states.sum()


def _groups_of(module: nn.Module) -> list[Any]:
    """Return the process groups over which FSDP2 shards or replicates a module's parts; none where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        for group in groups_of(part) if isinstance(part, FSDPModule) else ():
            return [each for each in group.mesh_info.mesh.get_all_groups() if each.size() > 1]
    return []


def _anyone(groups: list[Any], active: bool, device: torch.device) -> bool:
    """Return whether a process of the groups, which are the dimensions of a mesh, goes on."""
    for group in groups:
        active = any(flag for (flag,) in outcomes(group, [active], device))
    return active
