"""Sinkhorn's plan: its limit, its optimality, its marginals and the tolerance, against POT and the exact plan."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from near_future_cases import (
    COSTS,
    TIGHT,
    D,
    M,
    assert_distance_is_of_plan,
    assert_transports,
    exact_value,
    random_case,
    true_cost,
    true_costs,
    uniform,
)

from topd import near_future_divergence

linprog = pytest.importorskip("scipy.optimize").linprog
linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
ot = pytest.importorskip("ot")


@pytest.mark.parametrize("epsilon", [2.0, 0.5, 0.05])
def test_sinkhorns_closed_form_of_a_symmetric_two_by_two(epsilon):
    """Costs 0, c / c, 0: the diagonal holds 1 / (1 + exp(-c / epsilon)) of the mass; for the squares the unit is c / 2."""
    vectors = torch.tensor([[[0.0], [3.0]]], dtype=torch.float64)
    tokens = torch.tensor([[0, 1]])
    squares = near_future_divergence(
        student_vectors=vectors, teacher_vectors=vectors, cost="sqeuclidean", epsilon=epsilon, **TIGHT
    )
    mismatch = near_future_divergence(tokens, tokens, cost="mismatch", epsilon=epsilon, **TIGHT)
    for transport, c, unit in ((squares, 9.0, 4.5), (mismatch, 1.0, 1.0)):
        off = 1 / (1 + math.exp(c / (unit * epsilon)))
        expected = torch.tensor([[[1 - off, off], [off, 1 - off]]], dtype=transport.plan.dtype) / 2
        torch.testing.assert_close(transport.plan, expected, rtol=1e-6, atol=0)
        assert transport.distance.item() == pytest.approx(c * off, rel=1e-6)


@pytest.mark.parametrize("cost", COSTS)
def test_sinkhorn_falls_to_the_exact_distance_and_is_never_below(case, cost):
    costs = true_costs(case, cost)
    exact = np.array([exact_value(each) for each in costs])
    before = np.full(M, np.inf)
    for epsilon in (0.1, 0.05, 0.01, 0.001):
        transport = near_future_divergence(**case, cost=cost, epsilon=epsilon, max_iterations=20_000)
        distance = transport.distance.numpy()
        assert (transport.marginal_error <= 1e-4).all()
        assert (distance >= exact - 1e-6).all()
        unit = np.array([each.mean() for each in costs]) if cost == "sqeuclidean" else 1.0
        assert (distance <= before + 1e-4 * unit).all()
        before = distance
    assert (distance <= exact + 1e-3 * unit).all()


@pytest.mark.parametrize("width", [8, 256])
@pytest.mark.parametrize("cost", COSTS)
def test_the_default_options_reach_the_tolerance(cost, width):
    student, teacher = torch.randint(1000, (2, 16, 50)).unbind()
    transport = near_future_divergence(student, teacher, torch.randn(1000, width), cost=cost)
    assert (transport.marginal_error < 1e-4).all()


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
    transport = near_future_divergence(**case, cost=cost, epsilon=epsilon, **TIGHT)
    assert_transports(case, transport.plan, 1e-12)
    for each, plan, distance in zip(true_costs(case, cost), transport.plan.numpy(), transport.distance.tolist(), strict=True):
        rows, columns = each.shape
        expected = pots_plan(each, epsilon * (each.mean() if cost == "sqeuclidean" else 1.0), solve)
        np.testing.assert_allclose(plan[:rows, :columns], expected, rtol=0, atol=1e-5)
        assert distance == pytest.approx((expected * each).sum(), rel=1e-5)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_a_plan_is_two_potentials_and_the_cost(case, cost, epsilon):
    """log P + C / epsilon is u_i + v_j: with the marginals that is the one optimal plan. POT would need too long."""
    transport = near_future_divergence(**case, cost=cost, epsilon=epsilon, **TIGHT)
    assert_transports(case, transport.plan, 1e-12)
    assert (transport.marginal_error <= 1e-9).all()
    for each, plan in zip(true_costs(case, cost), transport.plan.numpy(), strict=True):
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
    transport = near_future_divergence(**case, epsilon=1e-3, max_iterations=iterations)
    assert_transports(case, transport.plan, 1e-6 if dtype == torch.float32 else 1e-12)
    assert_distance_is_of_plan(true_costs(case, "cosine"), transport, 1e-5 if dtype == torch.float32 else 1e-11)
    assert (transport.distance.double().numpy() >= [exact_value(each) - 1e-6 for each in true_costs(case, "cosine")]).all()


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
            transport = near_future_divergence(**case, cost=cost, epsilon=0.01, max_iterations=iterations)
            done = transport.marginal_error <= 1e-4
            torch.testing.assert_close(transport.distance[done], solved.distance[done], rtol=1e-3, atol=1e-3)


def test_a_smaller_tolerance_is_kept_too():
    case = random_case(7, 8)
    for tolerance in (1e-2, 1e-6, 1e-9):
        assert (near_future_divergence(**case, tolerance=tolerance).marginal_error <= tolerance).all()


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5)])
def test_equal_costs_give_the_uniform_plan(cost, rows, columns):
    """All tokens alike on a side: costs all 0, or all the same."""
    embedding = torch.randn(2, D, dtype=torch.float64)
    for token in (0, 1):
        student, teacher = torch.zeros(2, rows, dtype=torch.int64), torch.full((2, columns), token)
        transport = near_future_divergence(student, teacher, embedding, cost=cost)
        expected = torch.full((2, rows, columns), 1 / (rows * columns), dtype=torch.float64)
        torch.testing.assert_close(transport.plan, expected, rtol=1e-12, atol=0)
        expected = true_cost(embedding.numpy(), 0, token, cost)
        np.testing.assert_allclose(transport.distance.numpy(), [expected] * 2, rtol=1e-12, atol=1e-15)
