"""topd.near_future_divergence: literal cases, and distances and plans against scipy, POT and numpy in float64."""

import math

import numpy as np
import pytest
import torch
from near_future_cases import (
    COSTS,
    D,
    M,
    V,
    assert_distance_is_of_plan,
    assert_transports,
    exact_value,
    random_case,
    true_costs,
    uniform,
)

import topd
from topd import near_future_divergence

linprog = pytest.importorskip("scipy.optimize").linprog
linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
ot = pytest.importorskip("ot")


@pytest.mark.parametrize("cost", COSTS)
def test_exact_is_the_assignment_and_the_linear_program(case, cost):
    transport, costs = near_future_divergence(**case, cost=cost, solver="exact"), true_costs(case, cost)
    np.testing.assert_allclose(transport.distance.numpy(), [exact_value(each) for each in costs], rtol=1e-10, atol=1e-12)
    assert_transports(case, transport.plan, 1e-12)
    assert_distance_is_of_plan(costs, transport, 1e-12)
    assert transport.marginal_error.eq(0).all()


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_a_literal_two_by_two(solver):
    """Costs 1 - 1/sqrt(2), 2 / 1 - 1/sqrt(2), 1: the diagonal is cheaper by 1, the anti-diagonal is never taken."""
    x = torch.tensor([[[1.0, 0], [0, 1]]], dtype=torch.float64)
    y = torch.tensor([[[1.0, 1], [-1, 0]]], dtype=torch.float64)
    transport = near_future_divergence(student_vectors=x, teacher_vectors=y, solver=solver, epsilon=0.01)
    torch.testing.assert_close(transport.plan, torch.tensor([[[0.5, 0], [0, 0.5]]], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        transport.distance, torch.tensor([1 - 1 / math.sqrt(8)], dtype=torch.float64), rtol=0, atol=1e-12
    )


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
    transport = near_future_divergence(**case, solver=solver)
    torch.testing.assert_close(transport.plan, torch.full((M, 1, 5), 0.2, dtype=torch.float64), rtol=1e-12, atol=0)
    means = [each.mean() for each in true_costs(case, "cosine")]
    np.testing.assert_allclose(transport.distance.numpy(), means, rtol=1e-12)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("solver", "width"), [("exact", 8), ("exact", 4096), ("sinkhorn", 512), ("sinkhorn", 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_and_permuted_windows_are_no_distance_apart(cost, solver, width, dtype):
    """Sinkhorn too where the tokens are far apart for its epsilon."""
    embedding, tokens = torch.randn(200, width).to(dtype), torch.rand(3, 200).argsort(-1)[:, :50]
    for other in (tokens, tokens[:, torch.randperm(50)]):
        transport = near_future_divergence(tokens, other, embedding, cost=cost, solver=solver, epsilon=0.01)
        assert transport.distance.abs().max() <= 1e-6


def swapped(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    other = {"student": "teacher", "teacher": "student"}
    return {"_".join([other.get(name.split("_")[0], name), *name.split("_")[1:]]): value for name, value in case.items()}


@pytest.mark.parametrize("cost", COSTS)
def test_swapping_the_sides_transposes_sinkhorns_plan(case, cost):
    transport, back = (near_future_divergence(**each, cost=cost, tolerance=1e-7) for each in (case, swapped(case)))
    torch.testing.assert_close(back.distance, transport.distance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.plan.mT, transport.plan, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_swapping_the_sides_transposes_the_exact_plan(case, cost):
    """All tokens of a pair differ: there is one optimal plan."""
    tokens = torch.rand(M, V).argsort(-1)
    case["student_tokens"], case["teacher_tokens"] = (
        tokens[:, : case["student_tokens"].shape[1]],
        tokens[:, -case["teacher_tokens"].shape[1] :],
    )
    transport, back = (near_future_divergence(**each, cost=cost, solver="exact") for each in (case, swapped(case)))
    torch.testing.assert_close(back.distance, transport.distance, rtol=1e-12, atol=0)
    torch.testing.assert_close(back.plan.mT, transport.plan, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 128), (1, 128), (128, 1), (128, 127)])
def test_the_smallest_and_the_largest_windows(rows, columns, solver):
    case = random_case(rows, columns, m=2)
    transport = near_future_divergence(**case, solver=solver)
    assert_transports(case, transport.plan, 1e-12)
    expected = [ot.emd2(uniform(rows), uniform(columns), each, numItermax=10**6) for each in true_costs(case, "cosine")]
    assert (transport.distance.numpy() >= np.array(expected) - 1e-6).all()
    if solver == "exact" or 1 in (rows, columns):
        np.testing.assert_allclose(transport.distance.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_a_zero_vector_has_cosine_zero(solver):
    """Costs 1, 1 / 1 - 1/sqrt(2), 1, the zero vector first on either side in turn."""
    x = torch.tensor([[[0.0, 0], [1, 0]]], dtype=torch.float64)
    y = torch.tensor([[[1.0, 1], [0, 0]]], dtype=torch.float64)
    transport = near_future_divergence(student_vectors=x, teacher_vectors=y, solver=solver, epsilon=0.005)
    torch.testing.assert_close(transport.distance, torch.tensor([1 - 1 / math.sqrt(8)], dtype=torch.float64), rtol=0, atol=1e-9)
    nothing = near_future_divergence(student_vectors=torch.zeros_like(x), teacher_vectors=torch.zeros_like(y), solver=solver)
    assert nothing.distance.tolist() == [pytest.approx(1, rel=1e-12)]


def test_from_scores_to_weights_and_guidance():
    """The method end to end on a few random windows."""
    score, hidden = torch.rand(2, 20), torch.randn(2, 20, D, requires_grad=True)
    positions = topd.select_candidates(score, rule="top_k", value=2)
    case = random_case(5, 4)
    transport = near_future_divergence(**case)
    chosen = topd.divergent(transport.distance)
    assert chosen.sum() == M - 1
    assert topd.false_alarm_weights(score, positions, chosen, mode="cap").isfinite().all()
    states, head = hidden[:, :5].repeat(2, 1, 1)[chosen], topd.Head(case["embedding"].float().requires_grad_())
    loss = topd.guidance_kl(states, head, case["teacher_tokens"][chosen], transport.plan[chosen]).mean()
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()
