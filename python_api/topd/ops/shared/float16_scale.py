"""Choose the power of two by which a float16 tile of gradients to products is multiplied, so that small entries do not
underflow. The matrix products after it divide by the same.

A loop takes its tile's scale here once and hands it down as the argument `grad_scale` of the rows ops. It is known before
anything is computed, from what an entry can be at most.
"""

import math

import torch
from torch import Tensor


def scale_within(dtype: torch.dtype, largest: float) -> float:
    """Return the power of two by which a tile of this dtype is multiplied whose entries reach `largest`: 1 for every dtype but
    float16."""
    if dtype != torch.float16 or not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / largest))


def scaled_into(tile: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return the tile, filled with scale times the values, float16 held within its range."""
    if scale == 1:
        return tile.copy_(values)
    most = torch.finfo(tile.dtype).max
    return tile.copy_((values * scale).clamp_(-most, most))
