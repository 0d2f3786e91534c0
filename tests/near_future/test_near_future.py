"""topd.near_future_divergence: distances and plans against scipy, POT and numpy in float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import Largest

import topd
from topd import near_future_divergence
from topd.ops.transport.op import run_transport
from topd.ops.transport.spec import WindowSide

linprog = pytest.importorskip("scipy.optimize").linprog
linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
ot = pytest.importorskip("ot")

COSTS = ("cosine", "sqeuclidean", "mismatch")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
M, V, D = 4, 23, 6
TIGHT = {"tolerance": 1e-9, "max_iterations": 20_000}
needs_cpp = pytest.mark.skipif(not topd.backends()["cpp"], reason=topd.backends()["cpp"].detail)


def random_case(k_student: int, k_teacher: int, *, m: int = M, ragged: bool = False) -> dict[str, torch.Tensor]:
    """Arguments of near_future_divergence; what stands past a length must never be read."""
    case = {
        "student_tokens": torch.randint(V, (m, k_student)),
        "teacher_tokens": torch.randint(V, (m, k_teacher)),
        "embedding": torch.randn(V, D, dtype=torch.float64),
    }
    for side, past in (("student", -1), ("teacher", 10**9)) if ragged else ():
        tokens = case[f"{side}_tokens"]
        lengths = torch.randint(1, tokens.shape[1] + 1, (m,))
        tokens[torch.arange(tokens.shape[1]) >= lengths.unsqueeze(1)] = past
        case[f"{side}_lengths"] = lengths
    return case


def lengths_of(case: dict[str, torch.Tensor], side: str) -> list[int]:
    tokens = case[f"{side}_tokens"]
    return case.get(f"{side}_lengths", torch.full(tokens.shape[:1], tokens.shape[1])).tolist()


def true_costs(case: dict[str, torch.Tensor], cost: str) -> list[np.ndarray]:
    """Each pair's cost matrix, of its own lengths, one entry at a time."""
    found = []
    table = case["embedding"].double().cpu().numpy()
    students, teachers = (case[f"{side}_tokens"].tolist() for side in ("student", "teacher"))
    sizes = zip(lengths_of(case, "student"), lengths_of(case, "teacher"), strict=True)
    for student, teacher, (rows, columns) in zip(students, teachers, sizes, strict=True):
        entries = [[true_cost(table, u, v, cost) for v in teacher[:columns]] for u in student[:rows]]
        found.append(np.array(entries))
    return found


def true_cost(table: np.ndarray, u: int, v: int, cost: str) -> float:
    if cost == "mismatch":
        return float(u != v)
    x, y = table[u], table[v]
    if cost == "sqeuclidean":
        return float(((x - y) ** 2).sum())
    size = math.sqrt((x**2).sum() * (y**2).sum())
    return 1 - float((x * y).sum()) / size if size else 1.0


def uniform(size: int) -> np.ndarray:
    return np.full(size, 1 / size)


def exact_value(cost: np.ndarray) -> float:
    """An assignment between equally long windows, a linear program otherwise."""
    rows, columns = cost.shape
    if rows == columns:
        return float(cost[linear_sum_assignment(cost)].mean())
    sums = np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    found = linprog(cost.ravel(), A_eq=sums, b_eq=np.r_[uniform(rows), uniform(columns)], method="highs")
    assert found.status == 0
    return float(found.fun)


def assert_transports(case: dict[str, torch.Tensor], plan: torch.Tensor, tolerance: float) -> None:
    """Rows sum to 1 / the student's length, columns to 1 / the teacher's, both relative; nothing past the lengths."""
    assert (plan >= 0).all()
    sizes = zip(lengths_of(case, "student"), lengths_of(case, "teacher"), strict=True)
    for each, (rows, columns) in zip(plan.double(), sizes, strict=True):
        assert each[rows:].eq(0).all()
        assert each[:, columns:].eq(0).all()
        torch.testing.assert_close(each.sum(1)[:rows] * rows, torch.ones_like(each[:rows, 0]), rtol=0, atol=tolerance)
        torch.testing.assert_close(each.sum(0)[:columns] * columns, torch.ones_like(each[0, :columns]), rtol=0, atol=tolerance)


def assert_distance_is_of_plan(costs: list[np.ndarray], found: topd.Transport, tolerance: float) -> None:
    for cost, plan, distance in zip(costs, found.plan.double().numpy(), found.distance.tolist(), strict=True):
        rows, columns = cost.shape
        assert distance == pytest.approx((plan[:rows, :columns] * cost).sum(), rel=tolerance, abs=tolerance)


def equal_bits(one: topd.Transport, other: topd.Transport) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("distance", "plan", "marginal_error"))


SHAPES = {"equal": (7, 7, False), "unequal": (5, 8, False), "ragged": (9, 6, True)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def case(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    rows, columns, ragged = request.param
    return random_case(rows, columns, ragged=ragged)


@pytest.mark.parametrize("cost", COSTS)
def test_exact_is_the_assignment_and_the_linear_program(case, cost):
    found, costs = near_future_divergence(**case, cost=cost, solver="exact"), true_costs(case, cost)
    np.testing.assert_allclose(found.distance.numpy(), [exact_value(each) for each in costs], rtol=1e-10, atol=1e-12)
    assert_transports(case, found.plan, 1e-12)
    assert_distance_is_of_plan(costs, found, 1e-12)
    assert found.marginal_error.eq(0).all()


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_a_literal_two_by_two(solver):
    """Costs 1 - 1/sqrt(2), 2 / 1 - 1/sqrt(2), 1: the diagonal is cheaper by 1, the anti-diagonal is never taken."""
    x = torch.tensor([[[1.0, 0], [0, 1]]], dtype=torch.float64)
    y = torch.tensor([[[1.0, 1], [-1, 0]]], dtype=torch.float64)
    found = near_future_divergence(student_vectors=x, teacher_vectors=y, solver=solver, epsilon=0.01)
    torch.testing.assert_close(found.plan, torch.tensor([[[0.5, 0], [0, 0.5]]], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.distance, torch.tensor([1 - 1 / math.sqrt(8)], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("epsilon", [2.0, 0.5, 0.05])
def test_sinkhorns_closed_form_of_a_symmetric_two_by_two(epsilon):
    """Costs 0, c / c, 0: the diagonal holds 1 / (1 + exp(-c / epsilon)) of the mass; for the squares the unit is c / 2."""
    vectors = torch.tensor([[[0.0], [3.0]]], dtype=torch.float64)
    tokens = torch.tensor([[0, 1]])
    squares = near_future_divergence(
        student_vectors=vectors, teacher_vectors=vectors, cost="sqeuclidean", epsilon=epsilon, **TIGHT
    )
    mismatch = near_future_divergence(tokens, tokens, cost="mismatch", epsilon=epsilon, **TIGHT)
    for found, c, unit in ((squares, 9.0, 4.5), (mismatch, 1.0, 1.0)):
        off = 1 / (1 + math.exp(c / (unit * epsilon)))
        expected = torch.tensor([[[1 - off, off], [off, 1 - off]]], dtype=found.plan.dtype) / 2
        torch.testing.assert_close(found.plan, expected, rtol=1e-6, atol=0)
        assert found.distance.item() == pytest.approx(c * off, rel=1e-6)


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_rows_are_student_positions_and_columns_teacher_positions(solver):
    """The teacher starts one token later."""
    student, teacher = torch.tensor([[3, 4, 5]]), torch.tensor([[4, 5, 6]])
    plan = near_future_divergence(student, teacher, cost="mismatch", solver=solver, epsilon=0.01).plan
    expected = torch.tensor([[[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]]) / 3
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_one_token_against_many(solver):
    """The only plan is uniform."""
    case = random_case(1, 5)
    found = near_future_divergence(**case, solver=solver)
    torch.testing.assert_close(found.plan, torch.full((M, 1, 5), 0.2, dtype=torch.float64), rtol=1e-12, atol=0)
    means = [each.mean() for each in true_costs(case, "cosine")]
    np.testing.assert_allclose(found.distance.numpy(), means, rtol=1e-12)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("solver", "width"), [("exact", 8), ("exact", 4096), ("sinkhorn", 512), ("sinkhorn", 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_and_permuted_windows_are_no_distance_apart(cost, solver, width, dtype):
    """Sinkhorn too where the tokens are far apart for its epsilon."""
    embedding, tokens = torch.randn(200, width).to(dtype), torch.rand(3, 200).argsort(-1)[:, :50]
    for other in (tokens, tokens[:, torch.randperm(50)]):
        found = near_future_divergence(tokens, other, embedding, cost=cost, solver=solver, epsilon=0.01)
        assert found.distance.abs().max() <= 1e-6


@pytest.mark.parametrize("cost", COSTS)
def test_sinkhorn_falls_to_the_exact_distance_and_is_never_below(case, cost):
    costs = true_costs(case, cost)
    exact = np.array([exact_value(each) for each in costs])
    before = np.full(M, np.inf)
    for epsilon in (0.1, 0.05, 0.01, 0.001):
        found = near_future_divergence(**case, cost=cost, epsilon=epsilon, max_iterations=20_000)
        distance = found.distance.numpy()
        assert (found.marginal_error <= 1e-4).all()
        assert (distance >= exact - 1e-6).all()
        unit = np.array([each.mean() for each in costs]) if cost == "sqeuclidean" else 1.0
        assert (distance <= before + 1e-4 * unit).all()
        before = distance
    assert (distance <= exact + 1e-3 * unit).all()


@pytest.mark.parametrize("width", [8, 256])
@pytest.mark.parametrize("cost", COSTS)
def test_the_default_options_reach_the_tolerance(cost, width):
    student, teacher = torch.randint(1000, (2, 16, 50)).unbind()
    found = near_future_divergence(student, teacher, torch.randn(1000, width), cost=cost)
    assert (found.marginal_error < 1e-4).all()


def pots_plan(cost: np.ndarray, epsilon: float, solve: Callable[..., np.ndarray]) -> np.ndarray:
    rows, columns = cost.shape
    plan = solve(uniform(rows), uniform(columns), cost, epsilon, numItermax=20_000, stopThr=1e-9)
    assert max(abs(plan.sum(1) * rows - 1).max(), abs(plan.sum(0) * columns - 1).max()) < 1e-6
    return plan


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("solve", "epsilon"),
    [(ot.bregman.sinkhorn_log, 1.0), (ot.sinkhorn, 0.2), (ot.sinkhorn, 0.1)],
    ids=["log-1", "scaling-0.2", "scaling-0.1"],
)
def test_sinkhorn_is_pots_at_the_same_epsilon(case, cost, solve, epsilon):
    """epsilon is absolute, but for the squares in units of the mean cost of the pair."""
    found = near_future_divergence(**case, cost=cost, epsilon=epsilon, **TIGHT)
    assert_transports(case, found.plan, 1e-12)
    for each, plan, distance in zip(true_costs(case, cost), found.plan.numpy(), found.distance.tolist(), strict=True):
        rows, columns = each.shape
        expected = pots_plan(each, epsilon * (each.mean() if cost == "sqeuclidean" else 1.0), solve)
        np.testing.assert_allclose(plan[:rows, :columns], expected, rtol=0, atol=1e-5)
        assert distance == pytest.approx((expected * each).sum(), rel=1e-5)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_a_plan_is_two_potentials_and_the_cost(case, cost, epsilon):
    """log P + C / epsilon is u_i + v_j: with the marginals that is the one optimal plan. POT would need too long."""
    found = near_future_divergence(**case, cost=cost, epsilon=epsilon, **TIGHT)
    assert_transports(case, found.plan, 1e-12)
    assert (found.marginal_error <= 1e-9).all()
    for each, plan in zip(true_costs(case, cost), found.plan.numpy(), strict=True):
        p = plan[: each.shape[0], : each.shape[1]]
        logs = np.log(p.clip(1e-8)) + each / (epsilon * (each.mean() if cost == "sqeuclidean" else 1.0))
        differences, held = logs[:, None] - logs[None], (p[:, None] > 1e-5) & (p[None] > 1e-5)
        minors, counted = differences[..., None] - differences[..., None, :], held[..., None] & held[..., None, :]
        np.testing.assert_allclose(minors[counted], 0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("iterations", [1, 2, 3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_marginals_hold_however_few_the_iterations(case, dtype, iterations):
    """And the distance is that of the plan returned; marginal_error says how far the iteration was."""
    case["embedding"] = case["embedding"].to(dtype)
    found = near_future_divergence(**case, epsilon=1e-3, max_iterations=iterations)
    assert_transports(case, found.plan, 1e-6 if dtype == torch.float32 else 1e-12)
    assert_distance_is_of_plan(true_costs(case, "cosine"), found, 1e-5 if dtype == torch.float32 else 1e-11)
    assert (found.distance.double().numpy() >= [exact_value(each) - 1e-6 for each in true_costs(case, "cosine")]).all()


def test_the_marginal_error_of_one_iteration_is_large():
    case = random_case(7, 8)
    assert (near_future_divergence(**case, epsilon=1e-3, max_iterations=1).marginal_error > 1e-2).all()
    assert (near_future_divergence(**case, epsilon=1e-3, max_iterations=20_000).marginal_error <= 1e-4).all()


@pytest.mark.parametrize("cost", COSTS)
def test_a_small_marginal_error_means_that_the_plan_is_that_of_epsilon(cost):
    """However few the iterations. Identical windows of distinct tokens: the symmetric start is balanced at any epsilon."""
    same = {"student_tokens": torch.arange(3).unsqueeze(0), "teacher_tokens": torch.arange(3).unsqueeze(0)}
    same["embedding"] = torch.eye(3, dtype=torch.float64)
    for case in (same, random_case(7, 8)):
        solved = near_future_divergence(**case, cost=cost, epsilon=0.01, max_iterations=20_000)
        for iterations in range(1, 30):
            found = near_future_divergence(**case, cost=cost, epsilon=0.01, max_iterations=iterations)
            done = found.marginal_error <= 1e-4
            torch.testing.assert_close(found.distance[done], solved.distance[done], rtol=1e-3, atol=1e-3)


def test_a_smaller_tolerance_is_kept_too():
    case = random_case(7, 8)
    for tolerance in (1e-2, 1e-6, 1e-9):
        assert (near_future_divergence(**case, tolerance=tolerance).marginal_error <= tolerance).all()


def swapped(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    other = {"student": "teacher", "teacher": "student"}
    return {"_".join([other.get(name.split("_")[0], name), *name.split("_")[1:]]): value for name, value in case.items()}


@pytest.mark.parametrize("cost", COSTS)
def test_swapping_the_sides_transposes_sinkhorns_plan(case, cost):
    found, back = (near_future_divergence(**each, cost=cost, tolerance=1e-7) for each in (case, swapped(case)))
    torch.testing.assert_close(back.distance, found.distance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.plan.mT, found.plan, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_swapping_the_sides_transposes_the_exact_plan(case, cost):
    """All tokens of a pair differ: there is one optimal plan."""
    tokens = torch.rand(M, V).argsort(-1)
    case["student_tokens"], case["teacher_tokens"] = (
        tokens[:, : case["student_tokens"].shape[1]],
        tokens[:, -case["teacher_tokens"].shape[1] :],
    )
    found, back = (near_future_divergence(**each, cost=cost, solver="exact") for each in (case, swapped(case)))
    torch.testing.assert_close(back.distance, found.distance, rtol=1e-12, atol=0)
    torch.testing.assert_close(back.plan.mT, found.plan, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_a_padded_pair_is_the_pair_alone(cost, solver):
    case = random_case(9, 6, m=5, ragged=True)
    found = near_future_divergence(**case, cost=cost, solver=solver)
    sizes = zip(lengths_of(case, "student"), lengths_of(case, "teacher"), strict=True)
    for i, (rows, columns) in enumerate(sizes):
        student, teacher = case["student_tokens"][i : i + 1, :rows], case["teacher_tokens"][i : i + 1, :columns]
        alone = near_future_divergence(student, teacher, case["embedding"], cost=cost, solver=solver)
        torch.testing.assert_close(found.plan[i, :rows, :columns], alone.plan[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.distance[i], alone.distance[0], rtol=1e-9, atol=1e-12)
        assert found.plan[i, rows:].eq(0).all()
        assert found.plan[i, :, columns:].eq(0).all()


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 128), (1, 128), (128, 1), (128, 127)])
def test_the_smallest_and_the_largest_windows(rows, columns, solver):
    case = random_case(rows, columns, m=2)
    found = near_future_divergence(**case, solver=solver)
    assert_transports(case, found.plan, 1e-12)
    expected = [ot.emd2(uniform(rows), uniform(columns), each, numItermax=10**6) for each in true_costs(case, "cosine")]
    assert (found.distance.numpy() >= np.array(expected) - 1e-6).all()
    if solver == "exact" or 1 in (rows, columns):
        np.testing.assert_allclose(found.distance.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_no_pairs(cost, solver):
    found = near_future_divergence(**random_case(3, 5, m=0), cost=cost, solver=solver)
    assert (found.distance.shape, found.plan.shape, found.marginal_error.shape) == ((0,), (0, 3, 5), (0,))


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_a_zero_vector_has_cosine_zero(solver):
    """Costs 1, 1 / 1 - 1/sqrt(2), 1, the zero vector first on either side in turn."""
    x = torch.tensor([[[0.0, 0], [1, 0]]], dtype=torch.float64)
    y = torch.tensor([[[1.0, 1], [0, 0]]], dtype=torch.float64)
    found = near_future_divergence(student_vectors=x, teacher_vectors=y, solver=solver, epsilon=0.005)
    torch.testing.assert_close(found.distance, torch.tensor([1 - 1 / math.sqrt(8)], dtype=torch.float64), rtol=0, atol=1e-9)
    nothing = near_future_divergence(student_vectors=torch.zeros_like(x), teacher_vectors=torch.zeros_like(y), solver=solver)
    assert nothing.distance.tolist() == [pytest.approx(1, rel=1e-12)]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5)])
def test_equal_costs_give_the_uniform_plan(cost, rows, columns):
    """All tokens alike on a side: costs all 0, or all the same."""
    embedding = torch.randn(2, D, dtype=torch.float64)
    for token in (0, 1):
        student, teacher = torch.zeros(2, rows, dtype=torch.int64), torch.full((2, columns), token)
        found = near_future_divergence(student, teacher, embedding, cost=cost)
        expected = torch.full((2, rows, columns), 1 / (rows * columns), dtype=torch.float64)
        torch.testing.assert_close(found.plan, expected, rtol=1e-12, atol=0)
        expected = true_cost(embedding.numpy(), 0, token, cost)
        np.testing.assert_allclose(found.distance.numpy(), [expected] * 2, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_vectors_in_place_of_tokens(case, cost, solver):
    vectors = {f"{side}_vectors": case["embedding"][case[f"{side}_tokens"].clamp(0, V - 1)] for side in ("student", "teacher")}
    lengths = {name: value for name, value in case.items() if "lengths" in name}
    found = near_future_divergence(**vectors, **lengths, cost=cost, solver=solver)
    expected = near_future_divergence(**case, cost=cost, solver=solver)
    assert equal_bits(found, expected)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_tables_and_results(case, dtype, solver, cost):
    """The result is that of the table's own values in float64, to float32's rounding."""
    case["embedding"] = case["embedding"].to(dtype)
    found = near_future_divergence(**case, cost=cost, solver=solver)
    expected = near_future_divergence(**{**case, "embedding": case["embedding"].double()}, cost=cost, solver=solver)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for part in (found.distance, found.plan, found.marginal_error)} == {wanted}
    torch.testing.assert_close(found.distance.double(), expected.distance, rtol=1e-5, atol=1e-6)
    if solver == "sinkhorn":
        torch.testing.assert_close(found.plan.double(), expected.plan, rtol=0, atol=1e-5)


def test_results_are_constants_and_the_table_may_require_grad(case):
    embedding = case.pop("embedding").requires_grad_()
    found = near_future_divergence(**case, embedding=embedding)
    assert not any(part.requires_grad for part in (found.distance, found.plan, found.marginal_error))


def test_mismatch_needs_no_embedding_and_reads_none(case):
    embedding = case.pop("embedding")
    found = near_future_divergence(**case, cost="mismatch")
    other = near_future_divergence(**case, embedding=torch.full_like(embedding[:1], math.nan).float(), cost="mismatch")
    assert equal_bits(found, other)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_non_contiguous_operands(case, view, cost):
    expected = near_future_divergence(**case, cost=cost)
    strided = {name: value if value.dim() == 1 else view(value) for name, value in case.items()}
    assert not strided["embedding"].is_contiguous()
    assert equal_bits(near_future_divergence(**strided, cost=cost), expected)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("cost", COSTS)
def test_bits_repeat_with_any_number_of_threads(cost, threads):
    case = random_case(30, 25, m=12, ragged=True)
    case["embedding"] = case["embedding"].float()
    found = []
    for count in (1, 2, 2, 1):
        threads(count)
        found.append(near_future_divergence(**case, cost=cost))
    assert all(equal_bits(found[0], each) for each in found[1:])


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_nan_is_not_hidden(cost, side):
    """In a vector that counts it makes that pair's distance NaN, and no other's; past the length it is not read."""
    vectors = {"student_vectors": torch.randn(3, 4, D), "teacher_vectors": torch.randn(3, 4, D)}
    vectors[f"{side}_vectors"][1:, 2, 0] = math.nan
    lengths = {f"{side}_lengths": torch.tensor([4, 4, 2])}
    found = near_future_divergence(**vectors, **lengths, cost=cost)
    assert found.distance.isnan().tolist() == [False, True, False]
    assert (found.marginal_error <= 1e-4).tolist() == [True, False, True]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_cosine_does_not_depend_on_the_scale(scale):
    """Squares of these float32 numbers leave the range of float32; the vectors themselves do not."""
    x, y = torch.randn(2, M, 5, 64).unbind()
    expected = near_future_divergence(student_vectors=x, teacher_vectors=y)
    found = near_future_divergence(student_vectors=x * scale, teacher_vectors=y)
    torch.testing.assert_close(found.distance, expected.distance, rtol=1e-5, atol=1e-6)


def test_from_scores_to_weights_and_guidance():
    """The method end to end on a few random windows."""
    score, hidden = torch.rand(2, 20), torch.randn(2, 20, D, requires_grad=True)
    positions = topd.select_candidates(score, rule="top_k", value=2)
    case = random_case(5, 4)
    found = near_future_divergence(**case)
    chosen = topd.divergent(found.distance)
    assert chosen.sum() == M - 1
    assert topd.false_alarm_weights(score, positions, chosen, mode="cap").isfinite().all()
    states, head = hidden[:, :5].repeat(2, 1, 1)[chosen], topd.Head(case["embedding"].float().requires_grad_())
    loss = topd.guidance_kl(states, head, case["teacher_tokens"][chosen], found.plan[chosen]).mean()
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def hard_table(kind: str, dtype: torch.dtype) -> torch.Tensor:
    tokens = {"one token": 1, "duplicates": 2}.get(kind, 200)
    table = torch.randn(tokens, 16, dtype=torch.float64)
    if kind == "nearly identical":
        table = table[:1] + 1e-5 * table
    if kind == "clusters":
        table = table[:4].repeat(50, 1) + 1e-4 * table
    if kind == "some zero":
        table[::3] = 0
    return (table * {"huge": 1e6, "tiny": 1e-6}.get(kind, 1.0)).to(dtype)


HARD = ("random", "one token", "duplicates", "nearly identical", "clusters", "some zero", "huge", "tiny")


def both(
    table: torch.Tensor, k_student: int, k_teacher: int, *numbers: Any, m: int = 4, **options: Any
) -> tuple[topd.Transport, topd.Transport]:
    """The compiled op and the reference on random ragged windows."""
    sides = []
    for window in (k_student, k_teacher):
        sides.append(WindowSide(table, torch.randint(len(table), (m, window)), torch.randint(1, window + 1, (m,))))
    options = {"max_iterations": 200, "tolerance": 1e-4} | options
    compiled, reference = (topd.Transport(*run_transport(name, *sides, *numbers, **options)) for name in ("cpp", "eager"))
    return compiled, reference


def assert_agree(compiled: topd.Transport, reference: topd.Transport, *, plans: bool) -> None:
    """To 1e-5 of the distances' own scale; what float32 costs are rounded to may move a plan at a tiny epsilon."""
    for name in ("distance", "plan", "marginal_error"):
        assert getattr(compiled, name).isfinite().all(), name
        assert getattr(reference, name).isfinite().all(), name
    scale = reference.distance.abs().max().clamp_min(1).item()
    torch.testing.assert_close(compiled.distance, reference.distance, rtol=1e-5, atol=1e-5 if scale <= 1 else 1e-5 * scale)
    if plans:
        torch.testing.assert_close(compiled.plan, reference.plan, rtol=0, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.01, 0.001, 1e-4])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", HARD)
def test_compiled_is_the_reference(kind, cost, epsilon):
    for dtype in (torch.float32, torch.float64):
        found = both(hard_table(kind, dtype), 21, 18, cost, epsilon)
        assert_agree(*found, plans=dtype == torch.float64 or epsilon >= 0.01)
        assert (found[0].marginal_error <= 1e-4).all()


@needs_cpp
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from(COSTS),
    st.floats(-4, 1),
    st.sampled_from(HARD),
    st.sampled_from([1, 2, 5, 200]),
)
def test_compiled_is_the_reference_for_any_shape(number, k_student, k_teacher, cost, exponent, kind, iterations):
    torch.manual_seed(number)
    table = hard_table(kind, torch.float64)
    assert_agree(*both(table, k_student, k_teacher, cost, 10**exponent, max_iterations=iterations), plans=True)


def op_arguments(dtype: torch.dtype, cost: str) -> tuple[Any, ...]:
    table, lengths = torch.randn(V, D).to(dtype), torch.tensor([2, 4, 1])
    ids = torch.randint(V, (3, 4)), torch.randint(V, (3, 6))
    return (table, ids[0], lengths, table.clone(), ids[1], lengths, cost, 0.05, 50, 1e-4)


@needs_cpp
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, cost):
    results = torch.library.opcheck(torch.ops.topd.transport.default, op_arguments(dtype, cost))
    assert set(results.values()) == {"SUCCESS"}


@needs_cpp
def test_the_op_refuses_what_it_would_read_out_of_bounds():
    good = op_arguments(torch.float32, "cosine")
    for place, value in ((1, good[1] + V), (1, good[1] - V), (2, good[2] + 4), (5, good[5] * 0), (4, good[4][:2])):
        bad = (*good[:place], value, *good[place + 1 :])
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            torch.ops.topd.transport(*bad)
    assert torch.ops.topd.transport(*good)[0].isfinite().all()


def call(**changes: Any) -> topd.Transport:
    """A good call with some arguments exchanged."""
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    return near_future_divergence(
        **({"student_tokens": tokens, "teacher_tokens": tokens.clone(), "embedding": torch.ones(V, D)} | changes)
    )


def of_vectors(**changes: Any) -> topd.Transport:
    return near_future_divergence(
        **({"student_vectors": torch.ones(2, 3, D), "teacher_vectors": torch.ones(2, 4, D)} | changes)
    )


def ints(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value)


Refusal = tuple[Callable[[], Any], type[Exception], list[str]]
REFUSALS: dict[str, Refusal] = {
    "cost": (lambda: call(cost="euclidean"), ValueError, ["cost", "'cosine'", "'sqeuclidean'", "'mismatch'", "'euclidean'"]),
    "cost type": (lambda: call(cost=None), ValueError, ["cost", "'cosine'", "None"]),
    "solver": (lambda: call(solver="emd"), ValueError, ["solver", "'sinkhorn'", "'exact'", "'emd'"]),
    "epsilon 0": (lambda: call(epsilon=0.0), ValueError, ["epsilon", "> 0", "0.0"]),
    "epsilon nan": (lambda: call(epsilon=math.nan), ValueError, ["epsilon", "finite", "nan"]),
    "epsilon type": (lambda: call(epsilon="0.1"), TypeError, ["epsilon", "number", "str"]),
    "tolerance negative": (lambda: call(tolerance=-1.0), ValueError, ["tolerance", "> 0", "-1.0"]),
    "tolerance type": (lambda: call(tolerance=None), TypeError, ["tolerance", "number", "NoneType"]),
    "iterations 0": (lambda: call(max_iterations=0), ValueError, ["max_iterations", "> 0", "got 0"]),
    "iterations type": (lambda: call(max_iterations=10.0), TypeError, ["max_iterations", "int", "float"]),
    "no student": (lambda: call(student_tokens=None), TypeError, ["student_tokens", "Tensor", "NoneType"]),
    "no teacher": (lambda: call(teacher_tokens=None), TypeError, ["teacher_tokens", "Tensor", "NoneType"]),
    "tokens int32": (lambda: call(student_tokens=ints(2, 3).int()), TypeError, ["student_tokens", "int64", "int32", "cast"]),
    "tokens float": (lambda: call(teacher_tokens=torch.ones(2, 3)), TypeError, ["teacher_tokens", "int64", "float32"]),
    "tokens 1-D": (lambda: call(student_tokens=ints(3)), ValueError, ["student_tokens", "[m, K]", "[3]"]),
    "teacher 3-D": (lambda: call(teacher_tokens=ints(2, 3, 1)), ValueError, ["teacher_tokens", "[m, K]", "[2, 3, 1]"]),
    "window 0": (lambda: call(student_tokens=ints(2, 0)), ValueError, ["student_tokens", "1 to 128", "got 0"]),
    "window 129": (lambda: call(teacher_tokens=ints(2, 129)), ValueError, ["teacher_tokens", "1 to 128", "got 129"]),
    "m": (lambda: call(teacher_tokens=ints(4, 3)), ValueError, ["teacher_tokens", "[2, 3]", "student_tokens", "[4, 3]"]),
    "teacher device": (
        lambda: call(teacher_tokens=ints(2, 3).to("meta")),
        ValueError,
        ["teacher_tokens", "meta", "cpu", "move"],
    ),
    "no embedding": (lambda: call(embedding=None), TypeError, ["embedding", "Tensor", "NoneType"]),
    "embedding int": (lambda: call(embedding=ints(V, D)), TypeError, ["embedding", "float32", "int64"]),
    "embedding 3-D": (lambda: call(embedding=torch.ones(1, V, D)), ValueError, ["embedding", "[V, d]", f"[1, {V}, {D}]"]),
    "embedding device": (lambda: call(embedding=torch.ones(V, D).to("meta")), ValueError, ["embedding", "meta", "cpu", "move"]),
    "student id": (lambda: call(student_tokens=ints(2, 3, value=V)), ValueError, ["student_tokens", f"[0, {V})", f"got {V}"]),
    "teacher id": (lambda: call(teacher_tokens=ints(2, 3, value=-1)), ValueError, ["teacher_tokens", f"[0, {V})", "got -1"]),
    "lengths type": (lambda: call(student_lengths=[3, 3]), TypeError, ["student_lengths", "Tensor", "list"]),
    "lengths int32": (lambda: call(teacher_lengths=ints(2, value=3).int()), TypeError, ["teacher_lengths", "int64", "int32"]),
    "lengths shape": (lambda: call(student_lengths=ints(3, value=3)), ValueError, ["student_lengths", "[2]", "[3]"]),
    "lengths 0": (lambda: call(student_lengths=torch.tensor([3, 0])), ValueError, ["student_lengths", "[1, 3]", "got 0"]),
    "lengths large": (lambda: call(teacher_lengths=torch.tensor([4, 3])), ValueError, ["teacher_lengths", "[1, 3]", "got 4"]),
    "lengths device": (
        lambda: call(student_lengths=ints(2).to("meta")),
        ValueError,
        ["student_lengths", "meta", "cpu", "move"],
    ),
    "tokens and vectors": (
        lambda: call(student_vectors=torch.ones(2, 3, D)),
        ValueError,
        ["tokens", "student_vectors", "both"],
    ),
    "vectors and table": (lambda: of_vectors(embedding=torch.ones(V, D)), ValueError, ["embedding", "student_vectors", "both"]),
    "one side's vectors": (lambda: of_vectors(teacher_vectors=None), TypeError, ["teacher_vectors", "Tensor", "NoneType"]),
    "vectors of mismatch": (lambda: of_vectors(cost="mismatch"), ValueError, ["mismatch", "vectors", "student_tokens"]),
    "vectors int": (lambda: of_vectors(student_vectors=ints(2, 3, D)), TypeError, ["student_vectors", "float32", "int64"]),
    "vectors 2-D": (
        lambda: of_vectors(student_vectors=torch.ones(3, D)),
        ValueError,
        ["student_vectors", "[m, K, d]", "[3, 6]"],
    ),
    "vectors m": (
        lambda: of_vectors(teacher_vectors=torch.ones(1, 4, D)),
        ValueError,
        ["teacher_vectors", "[2, 4, 6]", "[1, 4, 6]"],
    ),
    "vectors d": (
        lambda: of_vectors(teacher_vectors=torch.ones(2, 4, 5)),
        ValueError,
        ["teacher_vectors", "[2, 4, 6]", "[2, 4, 5]"],
    ),
    "vectors window": (
        lambda: of_vectors(teacher_vectors=torch.ones(2, 0, D)),
        ValueError,
        ["teacher_vectors", "1 to 128", "got 0"],
    ),
    "vectors lengths": (
        lambda: of_vectors(teacher_lengths=torch.tensor([5, 1])),
        ValueError,
        ["teacher_lengths", "[1, 4]", "got 5"],
    ),
    "vectors device": (
        lambda: of_vectors(teacher_vectors=torch.ones(2, 4, D).to("meta")),
        ValueError,
        ["teacher_vectors", "meta", "cpu", "move"],
    ),
}


@pytest.mark.parametrize(("refused", "kind", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_names_the_argument_the_rule_and_what_came(refused, kind, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        refused()
    assert type(caught.value) is kind
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


def test_good_calls_beside_the_refusals():
    assert call().distance.shape == of_vectors().distance.shape == (2,)


@pytest.mark.parametrize(("package", "module", "k_teacher"), [("scipy", "scipy.optimize", 3), ("POT", "ot", 4)])
def test_exact_without_its_package_says_what_to_install(monkeypatch, package, module, k_teacher):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "topd\[transport\]"'):
        call(teacher_tokens=ints(2, k_teacher), solver="exact")


@pytest.mark.parametrize("solver", ["sinkhorn", "exact", "eager"])
def test_no_tensor_of_the_tables_size_is_made(solver):
    """Only the windows' rows of the table are read."""
    table, student, teacher = torch.randn(20_000, D), ints(3, 5), ints(3, 4)
    largest = Largest()
    with largest:
        if solver == "eager":
            full = [torch.full((3,), ids.shape[1]) for ids in (student, teacher)]
            windows = WindowSide(table, student, full[0]), WindowSide(table, teacher, full[1])
            distance = run_transport("eager", *windows, "cosine", 0.05, max_iterations=200, tolerance=1e-4)[0]
        else:
            distance = near_future_divergence(student, teacher, table, solver=solver).distance
    assert distance.shape == (3,)
    assert 0 < largest.nbytes < 20_000
