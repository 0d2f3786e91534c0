"""Candidates by every rule, the gate, and the weights of false alarms, against rules written out
in Python."""

import math
import random

import pytest
import torch

from topd import divergent, false_alarm_weights, select_candidates

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RULES = {"top_fraction": 0.3, "top_k": 3, "quantile": 0.7, "threshold": 0.5}
SCORE = [[5.0, 1.0, 4.0, 2.0, 3.0], [0.0, 7.0, 7.0, -1.0, 6.0]]
MASK = [[False, True, True, True, True], [True, True, True, False, False]]


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


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


def random_batch(columns: int = 23):
    """Scores with many ties; ragged responses behind prompts, holes in some, one empty, one of a single token."""
    score = torch.randint(-8, 9, (6, columns)).double() / 4
    mask = torch.rand(6, columns) < torch.tensor([1.0, 0.5, 0.8, 0.8, 0.3, 1.0]).unsqueeze(1)
    mask[1] = False
    mask[2] = torch.arange(columns) == 7
    mask[3, :9] = False
    mask[5, 15:] = False
    return score, mask


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
    found = select_candidates(score, mask=mask, rule=rule, value=value)
    assert (found.dtype, found.device, found.dim()) == (torch.int64, score.device, 2)
    assert found.tolist() == expected


def test_literal_packed_candidates(device):
    """Lengths 3, 0, 1, 4: 0.4 of them is 1, 0, 1 and floor(1.6 + 0.5) = 2."""
    score = torch.tensor([1.0, 3.0, 2.0, -5.0, 9.0, 8.0, 7.0, 9.0], device=device)
    found = select_candidates(score, cu_seqlens=offsets(3, 0, 1, 4).to(device), value=0.4)
    assert (found.dtype, found.tolist()) == (torch.int64, [1, 3, 4, 7])
    masked = torch.tensor([True, False, True, False, False, True, True, True], device=device)
    found = select_candidates(score, mask=masked, cu_seqlens=offsets(3, 0, 1, 4).to(device), value=0.4)
    assert found.tolist() == [2, 7]


def test_the_default_takes_218_of_9688(device):
    score = torch.randn(2, 9688, device=device)
    found = select_candidates(score)
    assert found[:, 0].bincount().tolist() == [218, 218]
    for row in range(2):
        assert found[found[:, 0] == row, 1].tolist() == score[row].topk(218).indices.sort().values.tolist()


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
        found = select_candidates(score, rule="quantile", value=q)
        assert found[:, 1].tolist() == [t for t, s in enumerate(row) if s >= bound]
        assert len(found)


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
        found = select_candidates(score.to(device), mask=mask.to(device), **options).tolist()
        rows = zip(score.tolist(), mask.tolist(), strict=True)
        taken = [brute_force(*row, rule, RULES[rule], separation) for row in rows]
        assert found == [[row, t] for row, columns in enumerate(taken) for t in columns]
        assert all(mask[row, t] for row, t in found)
        assert rule == "threshold" or {row for row, _ in found} == set(mask.any(1).nonzero()[:, 0].tolist())

        whole = offsets(*[mask.shape[1]] * len(mask)).to(device)
        flat = select_candidates(score.flatten().to(device), mask=mask.flatten().to(device), cu_seqlens=whole, **options)
        assert flat.tolist() == [row * mask.shape[1] + t for row, t in found]
        if separation <= 1:
            dense = select_candidates(score[mask].to(device), cu_seqlens=offsets(*mask.sum(1)).to(device), **options)
            assert torch.equal(mask.nonzero()[dense.cpu()], torch.tensor(found).reshape(-1, 2))


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
        found = select_candidates(score, rule=rule, value=value, min_separation=3)
        assert found[:, 1].tolist() == [1, 4, 7]
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
    found = select_candidates(score, mask=mask, **options)
    before = score.clone()
    for other in (score.t().contiguous().t(), score.clone().requires_grad_()):
        again = select_candidates(other, mask=mask.t().contiguous().t(), **options)
        assert torch.equal(again, found)
        assert not again.requires_grad
    assert torch.equal(score, before)


@pytest.mark.parametrize("rule", RULES)
def test_low_precision_selects_as_its_exact_copy_does(rule, device):
    score, mask = random_batch()
    options = {"mask": mask.to(device), "rule": rule, "value": RULES[rule], "min_separation": 2}
    truth = select_candidates(score.to(device), **options)
    for dtype in DTYPES:
        assert torch.equal(select_candidates(score.to(device, dtype), **options), truth)


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
    found = divergent(distance, **options)
    assert (found.dtype, found.device) == (torch.bool, distance.device)
    assert found.tolist() == expected


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
    found = divergent(torch.zeros(m, device=device))
    assert (found.dtype, found.tolist()) == (torch.bool, [True] * m)


def test_no_candidates_and_no_spread(device):
    empty = torch.zeros(0, device=device)
    for options in ({}, {"rule": "threshold", "value": 0.1}, {"rule": "mean_plus_std"}):
        found = divergent(empty, **options)
        assert (found.dtype, found.shape) == (torch.bool, (0,))
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


POSITIONS = [[0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]
DIVERGENT = [False, False, True, False, True]


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
    found = false_alarm_weights(score, positions, real, mask=mask, mode=mode)
    assert (found.dtype, found.device) == (dtype, score.device)
    assert found.tolist() == expected
    flat = (positions * torch.tensor([5, 1], device=device)).sum(1)
    options = {"mask": mask.flatten(), "cu_seqlens": offsets(5, 5).to(device), "mode": mode}
    assert torch.equal(false_alarm_weights(score.flatten(), flat, real, **options), found.flatten())
    if mode == "keep":
        assert torch.equal(false_alarm_weights(score, positions, real, mask=mask), found)


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
    found = false_alarm_weights(score, positions, none, mode="cap")
    assert found.tolist() == [expected, [1] * n]


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
        found = false_alarm_weights(score.to(device), positions.to(device), real.to(device), **on)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double().cpu(), expected, rtol=torch.finfo(dtype).eps, atol=0)
        at = mask.long().flatten().cumsum(0)[positions[:, 0] * mask.shape[1] + positions[:, 1]] - 1
        options = {"cu_seqlens": offsets(*mask.sum(1)).to(device), "mode": mode}
        packed = false_alarm_weights(score[mask].to(device), at.to(device), real.to(device), **options)
        assert torch.equal(packed, found[mask.to(device)])


@pytest.mark.parametrize("mode", ["keep", "cap", "mask"])
def test_weights_have_no_gradient_and_change_nothing(mode, device):
    score = torch.tensor(SCORE, device=device).t().contiguous().t().requires_grad_()
    positions, real = torch.tensor(POSITIONS, device=device), torch.tensor(DIVERGENT, device=device)
    found = false_alarm_weights(score, positions, real, mode=mode)
    assert found.is_leaf
    assert not found.requires_grad
    assert score.tolist() == SCORE
    assert torch.equal(false_alarm_weights(score, positions, real, mode=mode), found)


@pytest.mark.parametrize("mode", ["keep", "cap", "mask"])
def test_without_candidates_every_weight_is_one(mode, device):
    none = torch.zeros(0, dtype=torch.bool, device=device)
    nowhere = torch.zeros(0, 2, dtype=torch.int64, device=device)
    for shape in ((2, 3), (0, 3), (2, 0)):
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        for given in (None, mask):
            found = false_alarm_weights(torch.zeros(shape, device=device), nowhere, none, mask=given, mode=mode)
            assert torch.equal(found, torch.ones(shape, device=device))
    packed = false_alarm_weights(
        torch.zeros(3, device=device), nowhere[:, 0], none, cu_seqlens=offsets(0, 3).to(device), mode=mode
    )
    assert packed.tolist() == [1, 1, 1]


def select(**changes):
    """A good call with some arguments exchanged."""
    return select_candidates(**({"score": torch.tensor(SCORE)} | changes))


def packed(**changes):
    return select_candidates(**({"score": torch.ones(6), "cu_seqlens": offsets(4, 2)} | changes))


def gate(**changes):
    return divergent(**({"distance": torch.ones(4)} | changes))


def weigh(**changes):
    good = {"score": torch.tensor(SCORE), "positions": torch.tensor(POSITIONS), "divergent": torch.tensor(DIVERGENT)}
    return false_alarm_weights(**(good | changes))


def at(*positions) -> dict[str, torch.Tensor]:
    return {"positions": torch.tensor(positions), "divergent": torch.zeros(len(positions), dtype=torch.bool)}


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BOOLS = torch.tensor(MASK)
REFUSALS = {
    "score list": (lambda: select(score=SCORE), TypeError, ["score", "Tensor", "list"]),
    "score int": (lambda: select(score=torch.ones(2, 5).int()), TypeError, ["score", "float32", "int32", "cast"]),
    "score 1-D": (lambda: select(score=torch.ones(5)), ValueError, ["score", "[B, T]", "[5]", "cu_seqlens"]),
    "score 3-D": (lambda: select(score=torch.ones(2, 5, 1)), ValueError, ["score", "[B, T]", "[2, 5, 1]"]),
    "score packed 2-D": (lambda: packed(score=torch.ones(2, 3)), ValueError, ["score", "[N] with cu_seqlens", "[2, 3]"]),
    "score nan": (
        lambda: select(score=torch.tensor([[0.0, 1.0], [NAN, 0.0]])),
        ValueError,
        ["score", "NaN", "[1, 0]", "mask it out"],
    ),
    "score nan unmasked": (
        lambda: select(score=torch.full((2, 5), NAN), mask=BOOLS),
        ValueError,
        ["score", "NaN", "[0, 1]", "mask it out"],
    ),
    "mask list": (lambda: select(mask=MASK), TypeError, ["mask", "Tensor", "list"]),
    "mask int": (lambda: select(mask=BOOLS.int()), TypeError, ["mask", "torch.bool", "torch.int32", "cast"]),
    "mask shape": (lambda: select(mask=BOOLS[:1]), ValueError, ["mask", "[2, 5]", "[1, 5]", "score"]),
    "mask device": (lambda: select(mask=BOOLS.to("meta")), ValueError, ["mask", "meta", "cpu", "move"]),
    "offsets list": (lambda: packed(cu_seqlens=[0, 6]), TypeError, ["cu_seqlens", "Tensor", "list"]),
    "offsets int64": (
        lambda: packed(cu_seqlens=torch.tensor([0, 6])),
        TypeError,
        ["cu_seqlens", "torch.int32", "torch.int64", "cast"],
    ),
    "offsets 2-D": (lambda: packed(cu_seqlens=i32(0, 6)[None]), ValueError, ["cu_seqlens", "[B + 1]", "[[0, 6]]"]),
    "offsets none": (lambda: packed(cu_seqlens=i32()), ValueError, ["cu_seqlens", "[B + 1]", "[]"]),
    "offsets one": (lambda: packed(cu_seqlens=i32(0)), ValueError, ["cu_seqlens", "[B + 1]", "N = 6", "[0]"]),
    "offsets start": (lambda: packed(cu_seqlens=i32(1, 6)), ValueError, ["cu_seqlens", "start at 0", "[1, 6]", "cumsum"]),
    "offsets fall": (
        lambda: packed(cu_seqlens=i32(0, 4, 3, 6)),
        ValueError,
        ["cu_seqlens", "never decrease", "[0, 4, 3, 6]"],
    ),
    "offsets end": (lambda: packed(cu_seqlens=i32(0, 4)), ValueError, ["cu_seqlens", "end at N = 6", "[0, 4]"]),
    "offsets device": (
        lambda: packed(cu_seqlens=i32(0, 6).to("meta")),
        ValueError,
        ["cu_seqlens", "meta", "score", "cpu", "move"],
    ),
    "rule": (lambda: select(rule="top"), ValueError, ["rule", "'top_fraction'", "'threshold'", "'top'"]),
    "rule type": (lambda: select(rule=None), ValueError, ["rule", "'top_k'", "None"]),
    "fraction 0": (lambda: select(value=0.0), ValueError, ["value", "> 0", "0.0", "'top_fraction'", "fraction"]),
    "fraction above 1": (lambda: select(value=3), ValueError, ["value", "<= 1", "3", "fraction"]),
    "fraction nan": (lambda: select(value=NAN), ValueError, ["value", "finite", "nan"]),
    "fraction type": (lambda: select(value=None), TypeError, ["value", "number", "NoneType"]),
    "k without a value": (lambda: select(rule="top_k"), TypeError, ["value", "int", "float", "'top_k'", "of its own"]),
    "k float": (lambda: select(rule="top_k", value=3.0), TypeError, ["value", "int", "float", "count"]),
    "k bool": (lambda: select(rule="top_k", value=True), TypeError, ["value", "int", "bool"]),
    "k 0": (lambda: select(rule="top_k", value=0), ValueError, ["value", "> 0", "got 0", "count"]),
    "quantile low": (lambda: select(rule="quantile", value=-0.1), ValueError, ["value", ">= 0", "-0.1", "'quantile'"]),
    "quantile high": (lambda: select(rule="quantile", value=1.1), ValueError, ["value", "<= 1", "1.1"]),
    "threshold inf": (lambda: select(rule="threshold", value=INF), ValueError, ["value", "finite", "inf", "'threshold'"]),
    "threshold type": (lambda: select(rule="threshold", value="1"), TypeError, ["value", "number", "str"]),
    "separation negative": (lambda: select(min_separation=-1), ValueError, ["min_separation", "> 0", "-1", "0, for none"]),
    "separation float": (lambda: select(min_separation=0.0), TypeError, ["min_separation", "int", "float"]),
    "separation bool": (lambda: select(min_separation=False), TypeError, ["min_separation", "int", "bool"]),
    "distance list": (lambda: gate(distance=[1.0]), TypeError, ["distance", "Tensor", "list"]),
    "distance int": (lambda: gate(distance=torch.ones(4).int()), TypeError, ["distance", "float32", "int32"]),
    "distance 2-D": (lambda: gate(distance=torch.ones(4, 1)), ValueError, ["distance", "[m]", "[4, 1]", "flatten"]),
    "distance nan": (lambda: gate(distance=torch.tensor([0.0, NAN])), ValueError, ["distance", "NaN", "[1]"]),
    "gate rule": (lambda: gate(rule="quantile"), ValueError, ["rule", "'lowest_fraction_out'", "'quantile'"]),
    "gate fraction": (lambda: gate(value=1.2), ValueError, ["value", "<= 1", "1.2", "'lowest_fraction_out'"]),
    "gate bool": (lambda: gate(value=True), TypeError, ["value", "number", "bool"]),
    "gate no threshold": (lambda: gate(rule="threshold"), TypeError, ["value", "number", "NoneType", "of its own"]),
    "gate threshold": (lambda: gate(rule="threshold", value=-INF), ValueError, ["value", "finite", "-inf"]),
    "gate std": (lambda: gate(rule="mean_plus_std", value=NAN), ValueError, ["value", "finite", "nan", "'mean_plus_std'"]),
    "mode": (lambda: weigh(mode="drop"), ValueError, ["mode", "'keep'", "'cap'", "'mask'", "'drop'"]),
    "weights score nan": (lambda: weigh(score=torch.full((2, 5), NAN)), ValueError, ["score", "NaN"]),
    "weights score 1-D": (lambda: weigh(score=torch.ones(5)), ValueError, ["score", "[B, T]", "[5]"]),
    "weights mask": (lambda: weigh(mask=BOOLS.T), ValueError, ["mask", "[2, 5]", "[5, 2]"]),
    "positions list": (lambda: weigh(positions=POSITIONS), TypeError, ["positions", "Tensor", "list"]),
    "positions int32": (lambda: weigh(positions=i32(0, 1)[None]), TypeError, ["positions", "torch.int64", "torch.int32"]),
    "positions flat": (lambda: weigh(**at(0, 1)), ValueError, ["positions", "[m, 2]", "row, column", "[2]"]),
    "positions triples": (lambda: weigh(**at([0, 1, 2])), ValueError, ["positions", "[m, 2]", "[1, 3]"]),
    "positions device": (
        lambda: weigh(positions=torch.tensor(POSITIONS, device="meta")),
        ValueError,
        ["positions", "meta", "move"],
    ),
    "positions packed": (
        lambda: weigh(score=torch.ones(6), cu_seqlens=offsets(4, 2), **at([0, 1])),
        ValueError,
        ["positions", "[m] with cu_seqlens", "[1, 2]"],
    ),
    "position row": (lambda: weigh(**at([0, 1], [2, 0])), ValueError, ["positions", "lie in", "[2, 5]", "[2, 0]", "index 1"]),
    "position column": (lambda: weigh(**at([0, 5])), ValueError, ["positions", "lie in", "[0, 5]"]),
    "position negative": (lambda: weigh(**at([1, -1])), ValueError, ["positions", "lie in", "[1, -1]"]),
    "position entry": (
        lambda: weigh(score=torch.ones(6), cu_seqlens=offsets(4, 2), **at(2, 6)),
        ValueError,
        ["positions", "lie in", "[6]", "got 6", "index 1"],
    ),
    "position masked": (
        lambda: weigh(mask=BOOLS, **at([0, 1], [0, 0])),
        ValueError,
        ["positions", "mask is True", "[0, 0]", "index 1", "select_candidates"],
    ),
    "position twice": (
        lambda: weigh(**at([0, 1], [1, 1], [0, 1])),
        ValueError,
        ["positions", "distinct", "[0, 1]", "index 2"],
    ),
    "divergent int": (lambda: weigh(divergent=torch.ones(5).int()), TypeError, ["divergent", "torch.bool", "int32"]),
    "divergent shape": (lambda: weigh(divergent=BOOLS[0, :4]), ValueError, ["divergent", "[5]", "[4]", "positions"]),
    "divergent device": (lambda: weigh(divergent=BOOLS[0].to("meta")), ValueError, ["divergent", "meta", "move"]),
}


@pytest.mark.parametrize(("refused", "kind", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_names_the_argument_the_rule_and_what_came(refused, kind, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        refused()
    assert type(caught.value) is kind
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
