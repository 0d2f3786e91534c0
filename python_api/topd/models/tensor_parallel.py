"""What tensor parallelism leaves of a model's output layer: a DTensor whose rows are split over one dimension of a mesh.

FSDP2 leaves DTensors as well, whose ranks have other hidden states: they are no part of one vocabulary that ranks with the same
states share. peft, transformers and torch's FSDP are not imported with this module.
"""

import gc
import sys
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# Whether a parameter is FSDP2's shard, by the parameter: to find out takes some hundredths of a second.
_of_fsdp: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_dtensor(value: Any) -> bool:
    """Tell whether a tensor is a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "placements") and hasattr(value, "device_mesh")


def local_part(value: Any) -> Any:
    """Return this process's part of a DTensor; anything else as it is."""
    return value.to_local() if is_dtensor(value) else value


def is_vocabulary_shard(layer: nn.Module, tensor: Any) -> bool:
    """Tell whether a parameter of an output layer is a DTensor that tensor parallelism has split along the vocabulary: one
    Shard(0), Replicate on every other dimension of the mesh, and no shard of FSDP2."""
    if not is_dtensor(tensor):
        return False
    split = [each for each in tensor.placements if not each.is_replicate()]
    return len(split) == 1 and type(split[0]).__name__ == "Shard" and split[0].dim == 0 and not _is_fsdp_shard(layer, tensor)


def _is_fsdp_shard(layer: nn.Module, tensor: Tensor) -> bool:
    """Tell whether FSDP2 keeps a parameter apart as its shard. With tensor parallelism beside it the layer is FSDP2's also
    where the parameter is put together for a forward; which of the two it is, only FSDP2's own record of the parameter says."""
    if not getattr(layer, "_is_fsdp_managed_module", False):
        return False
    if tensor not in _of_fsdp:
        kind = getattr(sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param"), "FSDPParam", None)
        records = [each for each in gc.get_objects() if type(each) is kind]
        _of_fsdp[tensor] = not records or any(each.sharded_param is tensor for each in records)
    return bool(_of_fsdp[tensor])
