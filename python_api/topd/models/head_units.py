"""Which units of FSDP2 hold the output layer of a model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


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
