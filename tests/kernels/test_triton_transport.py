"""The Triton kernel of topd::transport, called directly: against the reference in float64, closed forms and scipy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from near_future_cases import COSTS, DTYPES, TIGHT, exact_value, true_cost
from torch import Tensor

from topd.ops.transport.eager import transport as reference
from topd.ops.transport.spec import WindowSide

pytest.importorskip("triton")
from topd_kernels.shared.launch import interpreted
from topd_kernels.transport import launches as kernels
from topd_kernels.transport.kernels import transport as kernel
from topd_kernels.transport.launches import launches, transport

V, D = 29, 6
Sides = tuple[WindowSide, WindowSide]


def random_sides(k_student: int, k_teacher: int, *, m: int = 2, ragged: bool = False, dtype=torch.float64) -> Sides:
    """WindowSide of two tables. What stands past a length must never be read."""
    sides = []
    for window, past in ((k_student, -1), (k_teacher, 10**9)):
        ids, lengths = torch.randint(V, (m, window)), torch.full((m,), window)
        if ragged:
            lengths = torch.randint(1, window + 1, (m,))
            ids[torch.arange(window) >= lengths.unsqueeze(1)] = past
        sides.append(WindowSide(torch.randn(V, D).to(dtype), ids, lengths))
    return sides[0], sides[1]


def of_vectors(*sides: list[list[float]], dtype: torch.dtype = torch.float64) -> Sides:
    """One problem between the listed vectors."""
    windows = (WindowSide(torch.tensor(x, dtype=dtype), torch.arange(len(x))[None], torch.tensor([len(x)])) for x in sides)
    return tuple(windows)


def solved(
    sides: Sides, device: torch.device, cost: str = "cosine", epsilon: float = 0.05, *, max_iterations=1000, tolerance=1e-4
) -> list[Tensor]:
    if device.type == "cpu" and not interpreted(kernel):
        pytest.skip("CPU tensors need TRITON_INTERPRET=1")
    tensors = (x.to(device) for side in sides for x in side)
    return [x.cpu() for x in transport(*tensors, cost, epsilon, max_iterations, tolerance)]


def assert_equals_the_reference(sides: Sides, device: torch.device, cost: str, epsilon: float, within: float = 1e-6) -> None:
    """Check distances to `within` of the unit that costs have, plans to `within` of a marginal."""
    wide = [side._replace(table=side.table.double()) for side in sides]
    tight = dict(TIGHT, max_iterations=3000)
    distance, plan, error = solved(sides, device, cost, epsilon, **tight)
    true_distance, true_plan, _ = reference(*wide, cost, epsilon, **tight)
    unit = max(1.0, true_distance.max().item())
    torch.testing.assert_close(distance.double(), true_distance, rtol=0, atol=within * unit)
    torch.testing.assert_close(plan.double(), true_plan, rtol=0, atol=within * true_plan.sum(-1).max().item())
    assert (error <= 1e-9 * (1 + 1e-6)).all()
    assert (plan >= 0).all()
    assert plan.sum((1, 2)).tolist() == pytest.approx([1.0] * len(plan), rel=1e-6)


def costs_of(sides: Sides, cost: str, i: int = 0) -> list[list[float]]:
    """True costs of problem i; both windows are of one table."""
    table = sides[0].table.double().numpy()
    rows, columns = (side.ids[i, : side.lengths[i]].tolist() for side in sides)
    return [[true_cost(table, u, v, cost) for v in columns] for u in rows]


def test_a_literal_two_by_two(device):
    """Costs 1 - 1/sqrt(2), 2 / 1 - 1/sqrt(2), 1: the diagonal is cheaper by 1, the anti-diagonal is never taken."""
    distance, plan, _ = solved(of_vectors([[1.0, 0], [0, 1]], [[1.0, 1], [-1, 0]]), device, epsilon=0.01)
    torch.testing.assert_close(plan, torch.tensor([[[0.5, 0], [0, 0.5]]], dtype=torch.float64), rtol=0, atol=1e-12)
    assert distance.item() == pytest.approx(1 - 1 / math.sqrt(8), abs=1e-12)


@pytest.mark.parametrize(("cost", "c", "unit"), [("sqeuclidean", 9.0, 4.5), ("mismatch", 1.0, 1.0)])
def test_the_closed_form_of_a_symmetric_two_by_two(device, cost, c, unit):
    """Costs 0, c / c, 0: the diagonal holds 1 / (1 + exp(-c / epsilon)) of the mass; for the squares the unit is c / 2."""
    distance, plan, _ = solved(of_vectors([[0.0], [3.0]], [[0.0], [3.0]]), device, cost, 0.5)
    off = 1 / (1 + math.exp(c / (unit * 0.5)))
    expected = torch.tensor([[[1 - off, off], [off, 1 - off]]], dtype=torch.float64) / 2
    torch.testing.assert_close(plan, expected, rtol=1e-12, atol=0)
    assert distance.item() == pytest.approx(c * off, rel=1e-12)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("k_student", "k_teacher", "ragged", "epsilon"),
    [(1, 1, False, 0.05), (2, 7, False, 0.01), (7, 2, True, 0.05), (13, 13, True, 0.001), (50, 13, False, 0.05)],
)
def test_equals_the_reference(device, cost, k_student, k_teacher, ragged, epsilon):
    assert_equals_the_reference(random_sides(k_student, k_teacher, ragged=ragged), device, cost, epsilon)


@pytest.mark.parametrize(("window", "cost", "epsilon"), [(50, "cosine", 0.01), (64, "sqeuclidean", 0.05)])
def test_equals_the_reference_at_large_windows(device, window, cost, epsilon):
    assert_equals_the_reference(random_sides(window, window, m=1), device, cost, epsilon)


@pytest.mark.parametrize(
    ("k_student", "k_teacher", "ragged", "cost", "epsilon"),
    [
        (65, 65, False, "cosine", 0.05),
        (65, 3, True, "mismatch", 0.01),
        (100, 5, True, "sqeuclidean", 0.01),
        (20, 128, True, "mismatch", 0.05),
        pytest.param(97, 100, True, "cosine", 0.01, marks=pytest.mark.slow),
        pytest.param(128, 128, False, "cosine", 0.05, marks=pytest.mark.slow),
        (128, 128, False, "sqeuclidean", 0.01),
    ],
)
def test_equals_the_reference_by_panels(device, k_student, k_teacher, ragged, cost, epsilon):
    sides = random_sides(k_student, k_teacher, m=2 if ragged else 1, ragged=ragged)
    assert_equals_the_reference(sides, device, cost, epsilon)


PEAKED = [(30, "cosine"), (40, "sqeuclidean"), pytest.param(100, "sqeuclidean", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("window", "cost"), PEAKED)
def test_equals_the_reference_where_costs_are_peaked(device, window, cost):
    """Vectors of lengths from 0.01 to 100 in few directions, most tokens on both sides."""
    table = torch.randn(3, D, dtype=torch.float64).repeat(10, 1)[:V] + 1e-3 * torch.randn(V, D, dtype=torch.float64)
    table *= 10 ** torch.linspace(-2, 2, V, dtype=torch.float64).unsqueeze(1)
    sides = random_sides(window, window, m=1)
    sides[1].ids[:, 5:] = sides[0].ids.flip(1)[:, 5:]
    sides = sides[0]._replace(table=table), sides[1]._replace(table=table)
    assert_equals_the_reference(sides, device, cost, 0.01)


def test_panels_agree_with_a_tile(device):
    """The same windows, padded past the largest tile."""
    sides = random_sides(40, 50, ragged=True)
    padded = [side._replace(ids=torch.nn.functional.pad(side.ids, (0, 70 - side.ids.shape[1]), value=-1)) for side in sides]
    assert [call(*each)[0][0].name for each in (sides, padded)] == ["transport", "transport_panels"]
    result, other = solved(sides, device, tolerance=1e-9), solved(tuple(padded), device, tolerance=1e-9)
    torch.testing.assert_close(other[0], result[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(other[1][:, :40, :50], result[1], rtol=0, atol=1e-10)
    assert not other[1][:, 40:].any()
    assert not other[1][:, :, 50:].any()


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, cost, dtype):
    """Against the same table in float64; results are float32, float64 where a table is."""
    sides = random_sides(5, 4, m=1, dtype=dtype)
    assert_equals_the_reference(sides, device, cost, 0.05, 1e-7 if dtype == torch.float64 else 3e-6)
    assert {x.dtype for x in solved(sides, device, cost)} == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize(("cost", "epsilon"), [("cosine", 0.001), ("sqeuclidean", 0.01), ("mismatch", 0.05)])
def test_never_below_the_assignment(device, cost, epsilon):
    """However few the iterations; at enough of them within epsilon times the entropy, whose largest is log K."""
    sides = random_sides(13, 13, m=1)
    sides = sides[0], sides[1]._replace(table=sides[0].table)
    costs = np.array(costs_of(sides, cost))
    exact = exact_value(costs)
    for iterations in (0, 1, 3, 200):
        distance, plan, error = solved(sides, device, cost, epsilon, max_iterations=iterations)
        assert distance.item() >= exact - 1e-12
        assert distance.item() == pytest.approx((plan[0].numpy() * costs).sum(), rel=1e-12)
        torch.testing.assert_close(plan.sum(1), torch.full((1, 13), 1 / 13, dtype=torch.float64), rtol=1e-12, atol=0)
        torch.testing.assert_close(plan.sum(2), torch.full((1, 13), 1 / 13, dtype=torch.float64), rtol=1e-12, atol=0)
    assert error.item() <= 1e-4
    assert distance.item() <= exact + epsilon * math.log(13) * (costs.mean() if cost == "sqeuclidean" else 1)


@pytest.mark.parametrize("iterations", [0, 1, 2, 6])
def test_out_of_iterations_is_where_the_reference_is(device, iterations):
    """Up to the first Newton steps, whose systems are solved less exactly; at the epsilon that was asked for."""
    sides = random_sides(7, 5)
    numbers = {"max_iterations": iterations, "tolerance": 1e-9}
    result, true = solved(sides, device, epsilon=1e-3, **numbers), reference(*sides, "cosine", 1e-3, **numbers)
    assert (result[2] > 1e-9).all()
    if iterations <= 2:
        for one, other in zip(result, true, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_zero_vectors_are_at_cosine_0(device):
    distance, plan, _ = solved(of_vectors([[0.0, 0], [0, 0]], [[1.0, 1], [0, 0], [3, 0]]), device)
    torch.testing.assert_close(plan, torch.full((1, 2, 3), 1 / 6, dtype=torch.float64), rtol=1e-12, atol=0)
    assert distance.item() == pytest.approx(1, rel=1e-12)


def test_cosines_at_any_scale(device):
    """float32 holds neither the squares nor, of the smallest, the inverse of the norm."""
    x, y = torch.randn(5, D), torch.randn(4, D)
    scales = torch.tensor([1e30, 1e-30, 1.0, 1e-38, 1e38 / 8])
    plain = solved(of_vectors(x.tolist(), y.tolist(), dtype=torch.float32), device)
    scaled = solved(of_vectors((x * scales[:, None]).tolist(), (y * scales[:4, None]).tolist(), dtype=torch.float32), device)
    for one, other in zip(plain[:2], scaled[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("windows", [(5, 4), (66, 70)])
def test_nan_stays_with_its_problem(device, cost, side, windows):
    sides = random_sides(*windows, m=2)
    table = sides[side].table.clone()
    table[0] = math.nan
    ids = torch.randint(1, V, sides[side].ids.shape)
    ids[0, -1] = 0
    sides = tuple(x._replace(table=table, ids=ids) if i == side else x for i, x in enumerate(sides))
    distance, plan, error = solved(sides, device, cost, max_iterations=20_000)
    assert distance.isnan().tolist() == error.isnan().tolist() == [True, False]
    assert plan[0].isnan().all()
    assert plan[1].isfinite().all()


@pytest.mark.parametrize("cost", COSTS)
def test_equal_windows_are_no_distance_apart(device, cost):
    table, ids = torch.randn(40, 300), torch.randperm(40)[None, :13]
    one, other = (WindowSide(table, each, torch.tensor([13])) for each in (ids, ids.flip(1)))
    assert solved((one, other), device, cost, 0.01)[0].item() <= 1e-6


@pytest.mark.parametrize("windows", [(7, 6), (70, 65)])
def test_repeats_bit_for_bit_and_problems_do_not_touch(device, windows):
    sides = random_sides(*windows, m=3, ragged=True, dtype=torch.float32)
    result, again = solved(sides, device), solved(sides, device)
    alone = solved(tuple(WindowSide(x.table, x.ids[1:2], x.lengths[1:2]) for x in sides), device)
    for one, other, single in zip(result, again, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[1:2], single)


def test_strides(device):
    """A table of every second row, a transposed one, ids of every second column."""
    student, teacher = random_sides(5, 4)
    odd_rows = student.table.repeat_interleave(2, 0)[::2]
    odd_ids = student.ids.repeat_interleave(2, 1)[:, ::2]
    turned = teacher.table.T.contiguous().T
    plain = solved((student, teacher), device)
    result = solved((student._replace(table=odd_rows, ids=odd_ids), teacher._replace(table=turned)), device)
    for one, other in zip(plain, result, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("programs", [2, 7])
def test_any_number_of_programs(device, programs, monkeypatch):
    """A program by panels takes one problem after the other, in scratch that the last one has left."""
    sides = random_sides(30, 67, m=5, ragged=True)
    result = solved(sides, device)
    monkeypatch.setattr(kernels, "processors", lambda like: programs)
    (launch,), _ = call(*sides)
    assert launch.grid == (min(programs, 5),)
    assert launch.arguments["Scratch"].shape == (min(programs, 5), 2, 128, 128)
    for one, other in zip(result, solved(sides, device), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("windows", [(5, 4), (65, 4)])
def test_no_problems(device, windows):
    distance, plan, error = solved(random_sides(*windows, m=0), device)
    assert [x.shape for x in (distance, plan, error)] == [(0,), (0, *windows), (0,)]


def call(*sides: WindowSide, cost: str = "cosine") -> Any:
    return launches(*(x for side in sides for x in side), cost, 0.05, 10, 1e-4)


def test_what_is_refused():
    with pytest.raises(ValueError, match="1 to 128 tokens on a GPU, got 129"):
        call(*random_sides(129, 2))
    with pytest.raises(ValueError, match="cosine, sqeuclidean, mismatch, got 'dot'"):
        call(*random_sides(2, 2), cost="dot")


@pytest.mark.parametrize(("short", "long"), [((33, 40), (50, 64)), ((3, 65), (128, 128))])
def test_one_binary_for_any_number_of_problems_and_any_lengths(short, long):
    """What may change from call to call is no constant of the kernel and not specialized."""
    (one,), _ = call(*random_sides(*short, m=1))
    (other,), _ = call(*random_sides(*long, m=16, ragged=True))
    assert one.kernel is other.kernel
    assert one.constants == other.constants
    assert one.grid == (1,)
    assert other.grid[0] == (16 if one.name == "transport" else min(16, kernels.processors(torch.empty(0))))
    if not interpreted(kernel):
        free = {parameter.name for parameter in one.kernel.params if parameter.do_not_specialize}
        assert free >= {"student_window", "teacher_window", "max_iterations"}
