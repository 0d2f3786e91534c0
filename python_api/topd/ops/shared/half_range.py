"""Powers of two by which float16 tiles of gradients to products are multiplied, so that a vocabulary's small entries stand
above float16's least number; the matrix products after them divide by the same. 1 for every other dtype. Known before anything
is computed, from what an entry can be at most for an upstream gradient of 1 and a slope of 1:

- the forward KL's, with or without a clip, the JSD's, the skew KL's and the total variation's: 1;
- a KL's from the student's side: its row's value and 1. REVERSE is left to them, and what is beyond is held there;
- of the mass outside the ids: 1; the entropy's: p |log p| + p H, below 1 + log V.
"""

import math

import torch
from torch import Tensor

REVERSE, BOUNDED, LOGPROBS = 250.0, 2.0, 20.0


def _power_of_two(dtype: torch.dtype, largest: float) -> float:
    if dtype != torch.float16 or not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / largest))


def divergence_scale(dtype: torch.dtype, divergence: str, hard_weight: float, slope: float) -> float:
    """Of a tile of this dtype for linear_divergence; slope = scale / temperature of the student."""
    bound = REVERSE if divergence in ("reverse_kl", "skew_reverse_kl") else BOUNDED
    return _power_of_two(dtype, abs(slope) * (bound + abs(hard_weight)))


def logprob_scale(dtype: torch.dtype, slope: float) -> float:
    """Of both tiles of this dtype for linear_logprobs; slope = scale / temperature."""
    return _power_of_two(dtype, abs(slope) * LOGPROBS)


def scaled_into(tile: Tensor, values: Tensor, scale: float) -> Tensor:
    """tile = scale values, float16 held within its range."""
    if scale == 1:
        return tile.copy_(values)
    most = torch.finfo(tile.dtype).max
    return tile.copy_((values * scale).clamp_(-most, most))
