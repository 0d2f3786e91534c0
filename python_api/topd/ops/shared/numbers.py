"""Numbers of an op that may change from call to call: temperature, a divergence's parameter, the weight of the hard targets.

An op's float arguments are constants to torch.compile: each new value would compile anew, and after eight raise. So inside a
compiled region these come as one small tensor, and the float arguments are ignored; outside they come as floats.
"""

import torch
from torch import Tensor


def numbers_of(*values: float) -> Tensor | None:
    """Return the numbers as float64 [k] on the CPU inside torch.compile, None outside."""
    if not torch.compiler.is_compiling():
        return None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])  # a product keeps a symbolic number symbolic


def numbers_in(numbers: Tensor) -> tuple[float, ...]:
    """Return what `numbers_of` packed."""
    return tuple(numbers.tolist())
