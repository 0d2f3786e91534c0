"""topd.divergent: which candidates are divergent by their distance."""

import math

import pytest
import torch
from selection_cases import DTYPES

from topd import divergent

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True, True, True, False, True]),  # floor(0.3 * 5) = 1 goes out
        ({"value": 0.4}, [True, True, False, False, True]),
        ({"value": 0.6}, [False, True, False, False, True]),  # of the two 0.3125 the earlier goes first
        ({"value": 0}, [True] * 5),
        ({"value": 1}, [False] * 5),
        ({"rule": "threshold", "value": 0.25}, [True, True, False, False, True]),
        ({"rule": "threshold", "value": 0.5}, [False] * 5),
        ({"rule": "threshold", "value": -1}, [True] * 5),
        ({"rule": "mean_plus_std"}, [False, False, False, False, True]),  # mean 0.275, std 0.146
        ({"rule": "mean_plus_std", "value": 0.1}, [True, True, False, False, True]),
        ({"rule": "mean_plus_std", "value": -1.0}, [True, True, True, False, True]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_literal_gate(options, expected, dtype, device):
    distance = torch.tensor([0.3125, 0.3125, 0.1875, 0.0625, 0.5], dtype=dtype, device=device)
    diverges = divergent(distance, **options)
    assert (diverges.dtype, diverges.device) == (torch.bool, distance.device)
    assert diverges.tolist() == expected


def test_the_lowest_fraction_for_every_m(device):
    """Of equal distances the first go out; of distinct ones the lowest; exactly floor(value * m + 1e-9) of them."""
    for m in range(1, 51):
        distinct = torch.randperm(m, device=device).double()
        for value in (0.3, 0.1, 0.7, 0.29, 0.0, 1.0):
            out = math.floor(value * m + 1e-9)
            assert divergent(torch.ones(m, device=device), value=value).tolist() == [i >= out for i in range(m)]
            assert torch.equal(divergent(distinct, value=value), distinct >= out)
        assert torch.equal(divergent(distinct), divergent(distinct, value=0.3))
    assert math.floor(0.29 * 100) == 28  # what the 1e-9 is for
    assert divergent(torch.ones(100), value=0.29).sum() == 71


@pytest.mark.parametrize("m", [0, 1, 2, 3])
def test_of_three_candidates_or_fewer_none_goes_out(m, device):
    diverges = divergent(torch.zeros(m, device=device))
    assert (diverges.dtype, diverges.tolist()) == (torch.bool, [True] * m)


def test_no_candidates_and_no_spread(device):
    empty = torch.zeros(0, device=device)
    for options in ({}, {"rule": "threshold", "value": 0.1}, {"rule": "mean_plus_std"}):
        diverges = divergent(empty, **options)
        assert (diverges.dtype, diverges.shape) == (torch.bool, (0,))
    for dtype in DTYPES:
        for m in range(1, 60):
            equal = torch.full((m,), 0.7, dtype=dtype, device=device)
            assert not divergent(equal, rule="mean_plus_std", value=0.01).any()


def test_mean_plus_std_is_the_population_s(device):
    distance = torch.rand(37, dtype=torch.float64, device=device)
    for value in (-0.5, 0.0, 0.7, 1.0, 2.0):
        expected = distance > distance.mean() + value * distance.std(correction=0)
        assert torch.equal(divergent(distance, rule="mean_plus_std", value=value), expected)


def test_the_gate_takes_infinite_distances_and_gradients(device):
    distance = torch.tensor([INF, 0.0, 1.0, -0.0], device=device, requires_grad=True)
    assert divergent(distance, value=0.5).tolist() == [True, False, True, False]
    assert divergent(distance, value=0.25).tolist() == [True, False, True, True]
    assert not divergent(distance, rule="threshold", value=0.5).requires_grad
