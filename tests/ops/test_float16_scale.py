"""Powers of two by which float16 tiles of gradients are multiplied."""

import math

import pytest
import torch

from topd.ops.linear_divergence.spec import TRAITS, RowSpec
from topd.ops.linear_logprobs.spec import LogprobSpec
from topd.ops.shared.float16_scale import scale_within, scaled_into

LARGEST = torch.finfo(torch.float16).max


def row_spec(divergence: str, slope: float, hard_weight: float = 0.5) -> RowSpec:
    return RowSpec(slope, None, 1.0, None, 1.0, divergence, 0.0, hard_weight)


@pytest.mark.parametrize("slope", [1.0, -0.3, 1e-6, 1e7])
def test_scales_of_float16_are_powers_of_two_within_its_range(slope):
    for divergence, bound in (("forward_kl", 1.5), ("jsd", 1.5), ("reverse_kl", 250.5)):
        scale = row_spec(divergence, slope).grad_scale(torch.float16)
        assert math.frexp(scale)[0] == 0.5
        assert LARGEST / 8 < scale * bound * abs(slope) <= LARGEST
    assert LARGEST / 4 < LogprobSpec(slope, None, 1.0).grad_scale(torch.float16) * 20 * abs(slope) <= LARGEST


@pytest.mark.parametrize("divergence", TRAITS)
def test_other_dtypes_are_left_as_they_are(divergence):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert row_spec(divergence, 0.3).grad_scale(dtype) == LogprobSpec(0.3, None, 1.0).grad_scale(dtype) == 1


@pytest.mark.parametrize("largest", [0.0, math.inf, math.nan])
def test_without_a_bound_there_is_no_scale(largest):
    assert scale_within(torch.float16, largest) == 1


def test_what_leaves_the_range_is_held_at_its_end():
    tile = scaled_into(torch.empty(4, dtype=torch.float16), torch.tensor([1.0, -1e3, 1e3, 2.0**-30]), 256.0)
    assert tile.tolist() == [256.0, -LARGEST, LARGEST, 2.0**-22]
