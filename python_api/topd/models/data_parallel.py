"""Refuse a loss whose gradients no data-parallel wrapper would synchronise.

DDP, FSDP and DeepSpeed prepare a step's communication in the forward of what they wrap. An objective calls the layers of the
student, so it has to run inside that forward itself.
"""

import gc
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topd.models import fsdp2_state
from topd.models.properties import has_sharded_head

RECIPE = """\
call it by topd.integrations.distributed.inside(model, objective, batch), where model is what wraps or shards the student; or
put the loss into a module around the plain student and wrap that:

    class Loss(torch.nn.Module):
        def __init__(self, student, teacher):
            super().__init__()
            self.student, self.objective = student, topd.OPD(student, teacher)

        def forward(self, batch):
            return self.objective(batch).loss

    model = DistributedDataParallel(Loss(student, teacher))  # or FSDP, fully_shard, deepspeed.initialize
    model(batch).backward()

where no gradient is wanted, call it under torch.no_grad()"""


def check_synchronised(student: Any, *, look_around: bool, name: str = "student") -> bool:
    """Check that a loss with gradients runs inside the forward of the data-parallel wrapper of its student.

    Nothing is checked in one process, nor without gradients.

    Args:
        student: the model as the objective holds it.
        name: what the caller calls it.
        look_around: search this process for a DDP module around the student too; that takes some tenths of a second.

    Returns:
        Whether that search was made and found none.

    Raises:
        ValueError: the student is, contains or is inside a wrapper of several processes, whose forward is not running; its head
            is sharded.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if not torch.is_grad_enabled() or not isinstance(student, nn.Module):
        return False
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if not trained:
        return False
    for part in student.modules():
        if _is_idle(part):
            _refuse(name, part)
    if has_sharded_head(student):
        raise ValueError(
            f"{name} must hold its whole head while the loss runs, got a DTensor in {type(student).__name__}; {RECIPE}"
        )
    in_ddp = _holds(DistributedDataParallel._active_ddp_module, trained)
    if in_ddp or not look_around or torch.distributed.get_world_size() == 1:
        return False
    around = _idle_around(trained)
    if around is not None:
        _refuse(name, around)
    return True


def is_sharded_in_place(model: Any) -> bool:
    """Return whether FSDP2 wraps a model without a module of its own around it."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_deepspeed(model: Any) -> bool:
    """Return whether a model is an engine of DeepSpeed, which is not imported."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def is_in_forward(part: Any) -> bool:
    """Return whether the forward of a wrapper, or of the root of its tree, runs. DeepSpeed's engine does not say it: False."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(part, DistributedDataParallel):
        return part is DistributedDataParallel._active_ddp_module
    if isinstance(part, FSDPModule):  # fully_shard, replicate
        return fsdp2_state.is_in_forward(part)
    return isinstance(part, FullyShardedDataParallel) and _in_forward(part)


def _refuse(name: str, wrapper: nn.Module) -> NoReturn:
    """Raise the error that says how a wrapper has to go around the loss."""
    raise ValueError(
        f"{name} must be used inside the forward of its data-parallel wrapper, or its processes do not exchange gradients, got "
        f"a {type(wrapper).__name__} whose forward is not running; {RECIPE}"
    )


def _is_idle(part: nn.Module) -> bool:
    """Return whether the module is a wrapper of several processes whose own forward, or its root's, is not running."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(part, FSDPModule):
        processes = _mesh_size(part)
    elif isinstance(part, DistributedDataParallel | FullyShardedDataParallel):
        processes = _size(part.process_group)
    elif is_deepspeed(part):
        processes = int(getattr(part, "dp_world_size", torch.distributed.get_world_size()))
    else:
        return False
    return processes > 1 and not is_in_forward(part)


def _mesh_size(part: nn.Module) -> int:
    """Return how many processes hold the shards of an FSDP2 module."""
    meshes = [p.device_mesh.size() for p in part.parameters() if hasattr(p, "device_mesh")]
    return max(meshes, default=torch.distributed.get_world_size())


def _in_forward(part: Any) -> bool:
    """Return whether a unit of the FSDP1 tree, its root above all, is in its forward."""
    from torch.distributed.fsdp._common_utils import HandleTrainingState

    return any(handle._training_state == HandleTrainingState.FORWARD for handle in part._exec_order_data.all_handles)


def _idle_around(trained: set[int]) -> nn.Module | None:
    """Return a DDP module of several processes that holds trained parameters; None where there is none."""
    if next(_around(trained), None) is None:
        return None
    gc.collect()  # it may be one that nobody uses any more
    return next(_around(trained), None)


def _around(trained: set[int]) -> Iterator[nn.Module]:
    """Yield the DDP modules of several processes in this process's memory that hold trained parameters."""
    for each in gc.get_objects():
        if not issubclass(type(each), DistributedDataParallel) or not hasattr(each, "reducer"):  # its last attribute
            continue
        composed = isinstance(each.module, nn.ParameterList)  # torch's replicate(), which says nowhere whether a forward runs
        if not composed and _size(each.process_group) > 1 and _holds(each, trained):
            yield each


def _holds(wrapper: nn.Module | None, trained: set[int]) -> bool:
    """Return whether a wrapper has one of the parameters whose ids these are."""
    return wrapper is not None and any(id(parameter) in trained for parameter in wrapper.parameters())


def _size(group: Any) -> int:
    """Return how many processes a process group has; None stands for all."""
    return torch.distributed.get_world_size() if group is None else int(group.size())
