"""Random windows, and what a transport between them must be, by scipy and numpy in float64."""

import math

import numpy as np
import pytest
import torch

import topd

linprog = pytest.importorskip("scipy.optimize").linprog
linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
ot = pytest.importorskip("ot")
COSTS = ("cosine", "sqeuclidean", "mismatch")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
M, V, D = 4, 23, 6
TIGHT = {"tolerance": 1e-9, "max_iterations": 20_000}


def random_case(k_student: int, k_teacher: int, *, m: int = M, ragged: bool = False) -> dict[str, torch.Tensor]:
    """Return arguments of near_future_divergence; what stands past a length must never be read."""
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
    """Return each pair's cost matrix, of its own lengths, one entry at a time."""
    runs = []
    table = case["embedding"].double().cpu().numpy()
    students, teachers = (case[f"{side}_tokens"].tolist() for side in ("student", "teacher"))
    sizes = zip(lengths_of(case, "student"), lengths_of(case, "teacher"), strict=True)
    for student, teacher, (rows, columns) in zip(students, teachers, sizes, strict=True):
        entries = [[true_cost(table, u, v, cost) for v in teacher[:columns]] for u in student[:rows]]
        runs.append(np.array(entries))
    return runs


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
    """Return the cost of the best plan: an assignment between equally long windows, a linear program otherwise."""
    rows, columns = cost.shape
    if rows == columns:
        return float(cost[linear_sum_assignment(cost)].mean())
    sums = np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    solution = linprog(cost.ravel(), A_eq=sums, b_eq=np.r_[uniform(rows), uniform(columns)], method="highs")
    assert solution.status == 0
    return float(solution.fun)


def assert_transports(case: dict[str, torch.Tensor], plan: torch.Tensor, tolerance: float) -> None:
    """Check that rows sum to 1 / the student's length, columns to 1 / the teacher's, and that nothing is past the lengths."""
    assert (plan >= 0).all()
    sizes = zip(lengths_of(case, "student"), lengths_of(case, "teacher"), strict=True)
    for each, (rows, columns) in zip(plan.double(), sizes, strict=True):
        assert each[rows:].eq(0).all()
        assert each[:, columns:].eq(0).all()
        torch.testing.assert_close(each.sum(1)[:rows] * rows, torch.ones_like(each[:rows, 0]), rtol=0, atol=tolerance)
        torch.testing.assert_close(each.sum(0)[:columns] * columns, torch.ones_like(each[0, :columns]), rtol=0, atol=tolerance)


def assert_distance_is_of_plan(costs: list[np.ndarray], transport: topd.Transport, tolerance: float) -> None:
    for cost, plan, distance in zip(costs, transport.plan.double().numpy(), transport.distance.tolist(), strict=True):
        rows, columns = cost.shape
        assert distance == pytest.approx((plan[:rows, :columns] * cost).sum(), rel=tolerance, abs=tolerance)


def equal_bits(one: topd.Transport, other: topd.Transport) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("distance", "plan", "marginal_error"))
