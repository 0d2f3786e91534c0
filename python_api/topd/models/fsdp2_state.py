"""What FSDP2 keeps of its units. torch has no public names for it: they are read in this module alone.

A later torch may rename any of them. Then the error names both versions, and says what to do.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
KNOWN = "2.13"  # the torch whose names these are
# What to do with a model that FSDP or ZeRO-3 shards.
INSIDE = "run the loss inside the model's forward, topd.integrations.distributed.inside(model, forward, inputs)"


def groups_of(unit: Any) -> list[Any]:
    """Return the groups of parameters that a unit, a torch.distributed.fsdp.FSDPModule, shards."""
    return _read(lambda: list(unit._get_fsdp_state()._fsdp_param_groups))


def is_in_forward(unit: Any) -> bool:
    """Return whether the forward of the root of a unit's tree runs; the states of a tree share one context."""
    return _read(lambda: unit._get_fsdp_state()._state_ctx.iter_forward_root is not None)


def is_sharded_by_fsdp(tensor: Any) -> bool:
    """Return whether a parameter is a shard of FSDP2's, as it is outside the forward of its unit. What tensor parallelism has
    left is none."""
    return hasattr(tensor, "placements") and any(each is tensor for each in _read(_sharded_parameters))


def _sharded_parameters() -> list[Any]:
    """Return the shards of all units in this process. A parameter does not say that it is one, nor where its module is."""
    from torch.distributed._composable_state import _module_state_mapping

    states = [reference() for reference in list(_module_state_mapping.values())]
    groups = [group for state in states for group in getattr(state, "_fsdp_param_groups", ())]
    return [each.sharded_param for group in groups for each in group.fsdp_params]


def _read(names: Callable[[], T]) -> T:
    """Return what torch keeps.

    Raises:
        RuntimeError: this torch keeps it under other names.
    """
    try:
        return names()
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"topd reads how FSDP2 shards a model by names of torch {KNOWN} that are not public; torch {torch.__version__} has "
            f"others: {error}; install torch {KNOWN}, or a topd that names torch {torch.__version__} in docs/support.md"
        ) from error
