"""The units of FSDP2 that hold the output layer of a model, and how they stay whole for a loss that reads its weight.

FSDP2 gathers a unit in the forward of its modules, and shards it again where the backward pass comes to their inputs. A loss
reads the weight instead, in forward and backward; and where the last norm is in the same unit, and runs several times in a
step, the first of its backward passes would free what the others need.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from topd.models.fsdp2_state import groups_of

T = TypeVar("T")


def output_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the output layers of the models of transformers in a module."""
    for part in module.modules():
        layer = part.get_output_embeddings() if hasattr(type(part), "get_output_embeddings") else None  # type: ignore[operator]
        if isinstance(layer, nn.Module):
            yield layer


def head_units(module: nn.Module) -> list[Any]:
    """Return the units of FSDP2 in a module, itself included, that hold output layers of models of transformers: the layer's
    own unit, the units of what is in it (PEFT), and those of the modules around it."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    inner = {id(part) for layer in output_layers(module) for part in layer.modules()}
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    return [unit for unit in units if any(id(part) in inner for part in unit.modules())]


def with_whole_heads(root: nn.Module, compute: Callable[[], T], *, begins: bool = True) -> T:
    """Return compute() while the output layers in a module are gathered; they stay so until the backward pass has ended.

    Args:
        root: in whose forward this runs; what its own unit holds is gathered there anyway.
        compute: returns tensors, in tuples, lists or dicts, or nothing through which gradients flow.
        begins: whether the root's forward has just begun. Then what an earlier loss, whose backward pass was never made, has
            left gathered is gathered anew: an optimizer may have changed it.
    """
    units = [unit for unit in head_units(root) if unit is not root]
    if not units:
        return compute()
    for unit in units if begins else ():
        unit.reshard()
    whole = _Whole(units)
    try:
        result = compute()
    except BaseException:
        whole.end()
        raise
    leaves = torch.utils._pytree.tree_leaves(result)
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    for output in outputs:
        output.register_hook(whole.backward_begins)
    if not outputs:
        whole.end()
    return result


# When FSDP2 would shard a group of parameters again, of those that stay gathered. One entry, however many losses hold a group:
# the first backward pass to end gives it back, and that of another loss gathers it once more.
_settings: WeakKeyDictionary[Any, tuple[Any, bool]] = WeakKeyDictionary()


class _Whole:
    """Units that stay gathered from a forward to the end of its backward pass, which follows `backward_begins`."""

    def __init__(self, units: list[Any]) -> None:
        self.units, self.running = units, False
        self.groups = [group for unit in units for group in groups_of(unit)]
        self.begin()

    def begin(self) -> None:
        """Gather the units, and keep FSDP2 from sharding them again."""
        for unit in self.units:
            unit.unshard()
        for group in self.groups:
            _settings.setdefault(group, (group.post_forward_mesh_info, group.reshard_after_backward))
            group.post_forward_mesh_info, group.reshard_after_backward = None, False

    def backward_begins(self, _gradient: Tensor) -> None:
        """Follow a backward pass to its end; a second one through the same graph finds the units sharded."""
        if self.running:
            return
        self.running = True
        self.begin()
        # FSDP2 ends its own backward pass in a callback too, which may come after this one: end behind it.
        _at_the_end(lambda: _at_the_end(self.end))

    def end(self) -> None:
        """Shard the units again, and let FSDP2 do so as before."""
        self.running = False
        for group in self.groups:
            if group in _settings:
                group.post_forward_mesh_info, group.reshard_after_backward = _settings.pop(group)
        for unit in self.units:
            unit.reshard()


def _at_the_end(callback: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs has ended, behind those that were to be called so far."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
