"""topd.false_alarm_weights: the weights of candidates that are not divergent."""

import math

import pytest
import torch
from selection_cases import DIVERGENT, DTYPES, MASK, POSITIONS, SCORE, offsets, random_batch

from topd import false_alarm_weights, select_candidates

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("keep", [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        ("mask", [[1, 1, 0, 0, 1], [1, 0, 1, 1, 1]]),
        ("cap", [[1, 1, 0.5, 1, 1], [1, 1, 1, 1, 1]]),  # lower medians 2 of 1, 4, 2, 3 and 7 of 0, 7, 7
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_literal_weights(mode, expected, dtype, device):
    score, mask = torch.tensor(SCORE, dtype=dtype, device=device), torch.tensor(MASK, device=device)
    positions, real = torch.tensor(POSITIONS, device=device), torch.tensor(DIVERGENT, device=device)
    weights = false_alarm_weights(score, positions, real, mask=mask, mode=mode)
    assert (weights.dtype, weights.device) == (dtype, score.device)
    assert weights.tolist() == expected
    flat = (positions * torch.tensor([5, 1], device=device)).sum(1)
    options = {"mask": mask.flatten(), "cu_seqlens": offsets(5, 5).to(device), "mode": mode}
    assert torch.equal(false_alarm_weights(score.flatten(), flat, real, **options), weights.flatten())
    if mode == "keep":
        assert torch.equal(false_alarm_weights(score, positions, real, mask=mask), weights)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([4.0, 1.0, 2.0], [0.5, 1, 1]),
        ([4.0, 1.0, 2.0, 1.0], [0.25, 1, 0.5, 1]),  # the lower of 1 and 2
        ([3.0, -1.0, -2.0, 0.0, -5.0], [0, 1, 1, 0, 1]),  # median -1: max(median, 0) = 0, also over the score 0
        ([-1.0, -3.0, -2.0], [0, 1, 1]),  # median -2
        ([5.0, 0.0, 0.0], [0, 1, 1]),
        ([0.0, 0.0, 0.0], [1, 1, 1]),
        ([INF, 1.0, 2.0], [0, 1, 1]),
        ([INF, INF, 2.0], [1, 1, 1]),
        ([-INF, -INF, 2.0], [1, 1, 0]),
        ([7.0], [1]),
    ],
)
def test_the_cap_of_one_trajectory(row, expected, device):
    """Every position is a false alarm; the trajectory beside it has a median of its own."""
    n = len(row)
    score = torch.tensor([row, [100.0] * n], device=device)
    positions = torch.tensor([[0, t] for t in range(n)], device=device)
    none = torch.zeros(n, dtype=torch.bool, device=device)
    weights = false_alarm_weights(score, positions, none, mode="cap")
    assert weights.tolist() == [expected, [1] * n]


@pytest.mark.parametrize("mode", ["keep", "cap", "mask"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_against_the_text(mode, dtype, device):
    """Random ragged batches, candidate by candidate, in any order; "cap" to one rounding of its dtype."""
    for _ in range(5):
        score, mask = random_batch()
        score = (score + torch.randn_like(score).abs()).to(dtype)
        positions = select_candidates(score, mask=mask, value=0.4)
        positions = positions[torch.randperm(len(positions))]
        real = torch.rand(len(positions)) < 0.5
        expected = torch.ones(score.shape, dtype=torch.float64)
        for (row, t), diverges in zip(positions.tolist(), real.tolist(), strict=True):
            median, mine = score[row][mask[row]].median().item(), score[row, t].item()
            capped = 1.0 if mine <= median else max(median, 0.0) / mine
            expected[row, t] = 1.0 if diverges else {"keep": 1.0, "mask": 0.0, "cap": capped}[mode]
        on = {"mask": mask.to(device), "mode": mode}
        weights = false_alarm_weights(score.to(device), positions.to(device), real.to(device), **on)
        assert weights.dtype == dtype
        torch.testing.assert_close(weights.double().cpu(), expected, rtol=torch.finfo(dtype).eps, atol=0)
        index = mask.long().flatten().cumsum(0)[positions[:, 0] * mask.shape[1] + positions[:, 1]] - 1
        options = {"cu_seqlens": offsets(*mask.sum(1)).to(device), "mode": mode}
        packed = false_alarm_weights(score[mask].to(device), index.to(device), real.to(device), **options)
        assert torch.equal(packed, weights[mask.to(device)])


@pytest.mark.parametrize("mode", ["keep", "cap", "mask"])
def test_weights_have_no_gradient_and_change_nothing(mode, device):
    score = torch.tensor(SCORE, device=device).t().contiguous().t().requires_grad_()
    positions, real = torch.tensor(POSITIONS, device=device), torch.tensor(DIVERGENT, device=device)
    weights = false_alarm_weights(score, positions, real, mode=mode)
    assert weights.is_leaf
    assert not weights.requires_grad
    assert score.tolist() == SCORE
    assert torch.equal(false_alarm_weights(score, positions, real, mode=mode), weights)


@pytest.mark.parametrize("mode", ["keep", "cap", "mask"])
def test_without_candidates_every_weight_is_one(mode, device):
    none = torch.zeros(0, dtype=torch.bool, device=device)
    nowhere = torch.zeros(0, 2, dtype=torch.int64, device=device)
    for shape in ((2, 3), (0, 3), (2, 0)):
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        for given in (None, mask):
            weights = false_alarm_weights(torch.zeros(shape, device=device), nowhere, none, mask=given, mode=mode)
            assert torch.equal(weights, torch.ones(shape, device=device))
    packed = false_alarm_weights(
        torch.zeros(3, device=device), nowhere[:, 0], none, cu_seqlens=offsets(0, 3).to(device), mode=mode
    )
    assert packed.tolist() == [1, 1, 1]
