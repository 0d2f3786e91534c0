"""topd.select_candidates: the positions of the highest scores of each trajectory, by four rules."""

import math
import random

import pytest
import torch
from selection_cases import DTYPES, MASK, SCORE, offsets, random_batch

from topd import select_candidates

INF, NAN = math.inf, math.nan
RULES = {"top_fraction": 0.3, "top_k": 3, "quantile": 0.7, "threshold": 0.5}


def brute_force(score, mask, rule, value, separation=0):
    """One trajectory's columns: all of them by falling score, then taken one at a time."""
    columns = [t for t in range(len(score)) if mask[t]]
    if not columns:
        return []
    limit = len(columns)
    if rule == "top_fraction":
        limit = max(1, math.floor(value * len(columns) + 0.5))
    elif rule == "top_k":
        limit = value
    elif rule == "quantile":
        bound = torch.tensor([score[t] for t in columns], dtype=torch.float64).quantile(value).item()
        columns = [t for t in columns if score[t] >= bound]
    else:
        columns = [t for t in columns if score[t] >= value]
    taken: list[int] = []
    for t in sorted(columns, key=lambda t: (-score[t], t)):
        if len(taken) < limit and all(abs(t - other) >= separation for other in taken):
            taken.append(t)
    return sorted(taken)


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("top_fraction", 0.0225, [[0, 2], [1, 1]]),
        ("top_fraction", 0.5, [[0, 2], [0, 4], [1, 1], [1, 2]]),  # 2 of 4, floor(1.5 + 0.5) = 2 of 3
        ("top_fraction", 0.49, [[0, 2], [0, 4], [1, 1]]),  # floor(1.96 + 0.5) = 2 and floor(1.47 + 0.5) = 1
        ("top_fraction", 1, [[0, 1], [0, 2], [0, 3], [0, 4], [1, 0], [1, 1], [1, 2]]),
        ("top_k", 1, [[0, 2], [1, 1]]),
        ("top_k", 3, [[0, 2], [0, 3], [0, 4], [1, 0], [1, 1], [1, 2]]),
        ("top_k", 100, [[0, 1], [0, 2], [0, 3], [0, 4], [1, 0], [1, 1], [1, 2]]),
        ("quantile", 0, [[0, 1], [0, 2], [0, 3], [0, 4], [1, 0], [1, 1], [1, 2]]),
        ("quantile", 0.5, [[0, 2], [0, 4], [1, 1], [1, 2]]),  # bounds 2.5 and 7
        ("quantile", 0.25, [[0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]),  # bounds 1.75 and 3.5
        ("quantile", 1.0, [[0, 2], [1, 1], [1, 2]]),
        ("threshold", 3, [[0, 2], [0, 4], [1, 1], [1, 2]]),
        ("threshold", 4.5, [[1, 1], [1, 2]]),
        ("threshold", 7.5, []),
        ("threshold", -1e9, [[0, 1], [0, 2], [0, 3], [0, 4], [1, 0], [1, 1], [1, 2]]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_literal_candidates(rule, value, expected, dtype, device):
    score, mask = torch.tensor(SCORE, dtype=dtype, device=device), torch.tensor(MASK, device=device)
    positions = select_candidates(score, mask=mask, rule=rule, value=value)
    assert (positions.dtype, positions.device, positions.dim()) == (torch.int64, score.device, 2)
    assert positions.tolist() == expected


def test_literal_packed_candidates(device):
    """Lengths 3, 0, 1, 4: 0.4 of them is 1, 0, 1 and floor(1.6 + 0.5) = 2."""
    score = torch.tensor([1.0, 3.0, 2.0, -5.0, 9.0, 8.0, 7.0, 9.0], device=device)
    positions = select_candidates(score, cu_seqlens=offsets(3, 0, 1, 4).to(device), value=0.4)
    assert (positions.dtype, positions.tolist()) == (torch.int64, [1, 3, 4, 7])
    masked = torch.tensor([True, False, True, False, False, True, True, True], device=device)
    positions = select_candidates(score, mask=masked, cu_seqlens=offsets(3, 0, 1, 4).to(device), value=0.4)
    assert positions.tolist() == [2, 7]


def test_the_default_takes_218_of_9688(device):
    score = torch.randn(2, 9688, device=device)
    positions = select_candidates(score)
    assert positions[:, 0].bincount().tolist() == [218, 218]
    for row in range(2):
        assert positions[positions[:, 0] == row, 1].tolist() == score[row].topk(218).indices.sort().values.tolist()


@pytest.mark.parametrize("n", [1, 2, 22, 23, 66, 67, 200, 1000])
def test_the_count_of_a_fraction(n):
    assert len(select_candidates(torch.randn(1, n))) == max(1, math.floor(0.0225 * n + 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_smaller_column(dtype, device):
    """Also between -0.0 and 0.0."""
    equal = torch.full((3, 1000), 0.25, dtype=dtype, device=device)
    assert select_candidates(equal, rule="top_k", value=4)[:, 1].tolist() == [0, 1, 2, 3] * 3
    zeros = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0]], dtype=dtype, device=device)
    assert select_candidates(zeros, rule="top_k", value=3).tolist() == [[0, 1], [0, 2], [0, 3]]
    assert select_candidates(equal, rule="top_k", value=3, min_separation=400)[:, 1].tolist() == [0, 400, 800] * 3


def test_infinite_scores_are_ordered(device):
    score = torch.tensor([[-INF, 2.0, INF, -INF], [-INF, -INF, -INF, -INF]], device=device)
    assert select_candidates(score, rule="top_k", value=2).tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]
    assert select_candidates(score, rule="threshold", value=-1e38).tolist() == [[0, 1], [0, 2]]


@pytest.mark.parametrize("q", [0.0, 0.1, 0.4, 0.5, 0.6, 0.9, 1.0])
def test_a_quantile_beside_infinite_scores_leaves_a_candidate(q, device):
    """Between two neighbours the bound is the upper one, whatever interpolation makes of an infinite one."""
    for row in ([-INF, 1.0, 2.0], [-INF, INF, 0.0], [INF, INF], [-INF, -INF, INF], [-INF, INF], [-3e38, 3e38]):
        score = torch.tensor([row], device=device)
        bound = sorted(row)[math.ceil(q * (len(row) - 1))]
        positions = select_candidates(score, rule="quantile", value=q)
        assert positions[:, 1].tolist() == [t for t, s in enumerate(row) if s >= bound]
        assert len(positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_quantile_is_torch_s(dtype, device):
    """Bit for bit, also where q * (n - 1) should be whole and is rounded."""
    for n in (1, 2, 3, 11, 101, 257):
        score = torch.randn(3, n, dtype=dtype, device=device)
        for q in (0.0, 0.07, 0.1, 0.29, 0.5, 0.7, 0.9, 0.9775, 1.0):
            expected = (score >= score.quantile(q, dim=1, keepdim=True)).nonzero()
            assert torch.equal(select_candidates(score, rule="quantile", value=q), expected)


@pytest.mark.parametrize("separation", [0, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("rule", RULES)
def test_against_brute_force(rule, separation, device):
    """By mask, and packed: with the holes and prompts masked, and, where distances do not count, without them."""
    for _ in range(5):
        score, mask = random_batch()
        options = {"rule": rule, "value": RULES[rule], "min_separation": separation}
        chosen = select_candidates(score.to(device), mask=mask.to(device), **options).tolist()
        rows = zip(score.tolist(), mask.tolist(), strict=True)
        taken = [brute_force(*row, rule, RULES[rule], separation) for row in rows]
        assert chosen == [[row, t] for row, columns in enumerate(taken) for t in columns]
        assert all(mask[row, t] for row, t in chosen)
        assert rule == "threshold" or {row for row, _ in chosen} == set(mask.any(1).nonzero()[:, 0].tolist())

        whole = offsets(*[mask.shape[1]] * len(mask)).to(device)
        flat = select_candidates(score.flatten().to(device), mask=mask.flatten().to(device), cu_seqlens=whole, **options)
        assert flat.tolist() == [row * mask.shape[1] + t for row, t in chosen]
        if separation <= 1:
            dense = select_candidates(score[mask].to(device), cu_seqlens=offsets(*mask.sum(1)).to(device), **options)
            assert torch.equal(mask.nonzero()[dense.cpu()], torch.tensor(chosen).reshape(-1, 2))


@pytest.mark.parametrize("separation", [0, 4])
@pytest.mark.parametrize("rule", RULES)
def test_a_ragged_batch_is_the_same_by_mask_and_by_offsets(rule, separation, device):
    lengths = [random.Random(rule).randint(0, 30) for _ in range(9)] + [0, 1, 0]
    mask = torch.arange(31) < torch.tensor(lengths).unsqueeze(1)
    score = torch.randn(len(lengths), 31)
    options = {"rule": rule, "value": RULES[rule], "min_separation": separation}
    padded = select_candidates(score.masked_fill(~mask, NAN).to(device), mask=mask.to(device), **options)
    packed = select_candidates(score[mask].to(device), cu_seqlens=offsets(*lengths).to(device), **options)
    assert torch.equal(mask.nonzero()[packed.cpu()], padded.cpu())


def test_selection_goes_on_until_k_are_taken(device):
    """The four highest stand together; separation 3 passes over three of them and still finds three."""
    score = torch.tensor([[1.0, 9.0, 8.0, 7.0, 6.0, 2.0, 0.0, 3.0]], device=device)
    for rule, value in (("top_k", 3), ("top_fraction", 0.375)):
        positions = select_candidates(score, rule=rule, value=value, min_separation=3)
        assert positions[:, 1].tolist() == [1, 4, 7]
    assert select_candidates(score, rule="top_k", value=5, min_separation=3)[:, 1].tolist() == [1, 4, 7]
    assert select_candidates(score, rule="threshold", value=6.5, min_separation=3)[:, 1].tolist() == [1]
    assert select_candidates(score, rule="threshold", value=6, min_separation=3)[:, 1].tolist() == [1, 4]


def test_neighbours_across_trajectories_do_not_count(device):
    """The last column of one row and the first of the next are no neighbours."""
    score = torch.tensor([[0.0, 9.0], [9.0, 0.0]], device=device)
    assert select_candidates(score, rule="top_k", value=2, min_separation=50).tolist() == [[0, 1], [1, 0]]
    packed = select_candidates(score.flatten(), cu_seqlens=offsets(2, 2).to(device), min_separation=50)
    assert packed.tolist() == [1, 2]


@pytest.mark.parametrize("separation", [0, 5])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_select(rule, separation, device):
    options = {"rule": rule, "value": RULES[rule], "min_separation": separation}
    for shape in ((0, 5), (3, 0), (0, 0)):
        assert select_candidates(torch.zeros(shape, device=device), **options).shape == (0, 2)
    unread = torch.full((2, 3), NAN, device=device)
    assert select_candidates(unread, mask=torch.zeros(2, 3, dtype=torch.bool, device=device), **options).shape == (0, 2)
    for lengths in ((), (0,), (0, 0)):
        cu_seqlens = offsets(*lengths).to(device)
        assert select_candidates(torch.zeros(0, device=device), cu_seqlens=cu_seqlens, **options).shape == (0,)


@pytest.mark.parametrize("rule", RULES)
def test_strides_gradients_and_repetition_change_nothing(rule, device):
    score, mask = (x.to(device) for x in random_batch())
    options = {"rule": rule, "value": RULES[rule], "min_separation": 2}
    positions = select_candidates(score, mask=mask, **options)
    before = score.clone()
    for other in (score.t().contiguous().t(), score.clone().requires_grad_()):
        again = select_candidates(other, mask=mask.t().contiguous().t(), **options)
        assert torch.equal(again, positions)
        assert not again.requires_grad
    assert torch.equal(score, before)


@pytest.mark.parametrize("rule", RULES)
def test_low_precision_selects_as_its_exact_copy_does(rule, device):
    score, mask = random_batch()
    options = {"mask": mask.to(device), "rule": rule, "value": RULES[rule], "min_separation": 2}
    truth = select_candidates(score.to(device), **options)
    for dtype in DTYPES:
        assert torch.equal(select_candidates(score.to(device, dtype), **options), truth)
