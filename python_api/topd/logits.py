"""From the output layer's matrix product to logits."""

import torch
from torch import Tensor


def shape_logits(product: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float = 1.0) -> Tensor:
    """Return logits / temperature of the matrix product (adapter included), as every eager path does it."""
    if bias is not None:
        product = product + bias
    if softcap is not None:
        return (softcap / temperature) * torch.tanh(product * (scale / softcap))
    return product if scale == temperature else product * (scale / temperature)
