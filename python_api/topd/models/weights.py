"""A model's parameters as tensors: other values in their places for a pass, which of them are elsewhere, a sample of them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SAMPLE = 64  # entries of each parameter in a sample


@contextmanager
def weights_replaced(pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Let parameters hold other values meanwhile; their own storage comes back, also where an error is raised.

    For a pass without gradients. The backward pass of a graph that was built before is not touched: when it runs, the values
    are back, which have never moved, and autograd has counted no change.

    Args:
        pairs: parameters, and tensors of the same shape, dtype and device.
    """
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for parameter, value in pairs:
            own.append((parameter, parameter.data))
            parameter.data = value
        yield
    finally:
        for parameter, value in own:
            parameter.data = value


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require grad, by their names; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def absent_weight(parameters: Mapping[str, Tensor]) -> str | None:
    """Return the name of a parameter that this process does not hold whole: sharded or offloaded; None where it holds all."""
    for name, tensor in parameters.items():
        if hasattr(tensor, "placements") or tensor.numel() == 0 or tensor.device.type == "meta":
            return name
    return None


@torch.no_grad()
def weight_sample(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return a float64 vector on the CPU by which weights are told apart: up to 64 entries of each parameter that this process
    holds, from its whole length."""
    entries = []
    for tensor in parameters.values():
        if absent_weight({"": tensor}) is None:
            flat = tensor.detach().flatten()
            entries.append(flat[:: -(-flat.numel() // SAMPLE)].to(torch.float64))
    return torch.cat([each.cpu() for each in entries]) if entries else torch.zeros(0, dtype=torch.float64)
