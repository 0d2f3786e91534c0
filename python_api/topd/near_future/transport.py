"""The near future's distance: optimal transport between a student's and a teacher's continuation of one prefix.

The score of TOPD (arXiv 2606.00305): D_OT = min <P, C> over plans between the two windows' tokens, both uniformly weighted. A
plan's rows are student positions, its columns teacher positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from topd.backends import choose_backend
from topd.checks.tokens import check_lengths
from topd.checks.values import FLOATING, check_tensor, choice, positive_int, real
from topd.near_future.exact import exact_transport
from topd.ops.transport.op import run_transport
from topd.ops.transport.spec import COSTS, MAX_WINDOW, WindowSide
from topd.options import Cost, Solver

SOLVERS: tuple[str, ...] = get_args(Solver)


@dataclass(frozen=True, eq=False)
class Transport:
    """The distance and the plan between each pair of windows, as `near_future_divergence` returns them; constants.

    Attributes:
        distance: [m] <P, C>, without the entropy term, in the unit of the cost.
        plan: [m, K_s, K_t], rows student positions, columns teacher positions; rows sum to 1 / student length, columns to
            1 / teacher length; 0 past the lengths.
        marginal_error: [m] the largest distance of a row or column sum from its marginal that the iteration left, in units of
            the marginal, before the plan was rounded onto its marginals; 0 for the exact solver.
    """

    distance: Tensor
    plan: Tensor
    marginal_error: Tensor


@torch.no_grad()
def near_future_divergence(
    student_tokens: Tensor | None = None,
    teacher_tokens: Tensor | None = None,
    embedding: Tensor | None = None,
    *,
    student_vectors: Tensor | None = None,
    teacher_vectors: Tensor | None = None,
    student_lengths: Tensor | None = None,
    teacher_lengths: Tensor | None = None,
    cost: Cost = "cosine",
    solver: Solver = "sinkhorn",
    epsilon: float = 0.05,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
) -> Transport:
    """Return the optimal-transport distance and plan between m pairs of short windows of tokens.

    Args:
        student_tokens, teacher_tokens: [m, K_s], [m, K_t] int64, 1 <= K <= 128; ids past a window's length are never read.
        embedding: [V, d] floating, the space in which tokens are compared (the method leaves it open; the objectives take the
            student's input embeddings). Only the windows' rows are read. May be None for the cost "mismatch".
        student_vectors, teacher_vectors: [m, K_s, d], [m, K_t, d] floating, in place of tokens and embedding.
        student_lengths, teacher_lengths: [m] int64, 1 <= length <= K; None: all of the window counts.
        cost: "cosine", 1 - cosine (a zero vector has cosine 0); "sqeuclidean"; "mismatch", 1 where the tokens differ.
        solver: "sinkhorn", entropic, on any device; "exact", on the CPU: scipy's linear_sum_assignment where both lengths are
            equal, POT's emd otherwise.
        epsilon: > 0, the entropy's weight: absolute for "cosine" and "mismatch", times the pair's mean cost for "sqeuclidean".
        max_iterations: > 0.
        tolerance: > 0; a pair is done when no row or column sum is further from its marginal, in units of the marginal.

    Returns:
        Transport, float32 (float64 where the vectors are), without gradient. The distance of "sinkhorn" is never below the
        exact one, and tends to it as epsilon falls.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, range or option. Lengths and ids are checked on the CPU.
        ImportError: the exact solver without scipy, or for unequal lengths without POT.

    Source: arXiv 2606.00305. Its authors leave space, cost, marginals and solver open; the defaults are ours.
    """
    choice("cost", cost, COSTS)
    choice("solver", solver, SOLVERS)
    real("epsilon", epsilon, low=0.0, open_low=True)
    real("tolerance", tolerance, low=0.0, open_low=True)
    positive_int("max_iterations", max_iterations)
    if student_vectors is not None or teacher_vectors is not None:
        if student_tokens is not None or teacher_tokens is not None or embedding is not None:
            raise ValueError("give either tokens with their embedding or student_vectors and teacher_vectors, got both")
        student, teacher = _from_vectors(student_vectors, teacher_vectors, cost, student_lengths, teacher_lengths)
    else:
        student, teacher = _from_tokens(student_tokens, teacher_tokens, embedding, cost, student_lengths, teacher_lengths)
    if solver == "exact":
        return Transport(*exact_transport(student, teacher, cost))
    backend = choose_backend(None, student.ids.device)
    results = run_transport(backend, student, teacher, cost, epsilon, max_iterations=max_iterations, tolerance=tolerance)
    return Transport(*results)


def window_lengths(name: str, lengths: object, windows: Sequence[int], device: torch.device) -> Tensor:
    """Return the checked lengths [m] int64 of windows [m, K]; None: all of each counts."""
    m, width = windows
    if lengths is None:
        return torch.full((m,), width, dtype=torch.int64, device=device)
    return check_lengths(name, lengths, width, shape=((m,), "one for each window"), device=(device, "windows"))


def _check_width(name: str, width: int) -> None:
    """Check how many tokens windows hold."""
    if not 1 <= width <= MAX_WINDOW:
        raise ValueError(f"{name} must hold windows of 1 to {MAX_WINDOW} tokens, got {width}")


def _from_tokens(
    student_tokens: object,
    teacher_tokens: object,
    embedding: object,
    cost: str,
    student_lengths: object,
    teacher_lengths: object,
) -> tuple[WindowSide, WindowSide]:
    """Check tokens with their embedding, and return both sides' windows."""
    student = check_tensor("student_tokens", student_tokens, dtype=torch.int64)
    teacher = check_tensor("teacher_tokens", teacher_tokens, dtype=torch.int64)
    for name, tokens in (("student_tokens", student), ("teacher_tokens", teacher)):
        if tokens.dim() != 2:
            raise ValueError(f"{name} must be [m, K], got {list(tokens.shape)}")
        _check_width(name, tokens.shape[1])
    device = (student.device, "student_tokens")
    shape = ((student.shape[0], teacher.shape[1]), "m as in student_tokens")
    check_tensor("teacher_tokens", teacher, shape=shape, device=device)
    own = window_lengths("student_lengths", student_lengths, student.shape, student.device)
    other = window_lengths("teacher_lengths", teacher_lengths, teacher.shape, student.device)
    if cost == "mismatch" and embedding is None:
        embedding = torch.empty((0, 1), device=student.device)
    table = check_tensor("embedding", embedding, dtype=FLOATING, device=device)
    if table.dim() != 2:
        raise ValueError(f"embedding must be [V, d], got {list(table.shape)}")
    sides = WindowSide(table, student, own), WindowSide(table, teacher, other)
    if cost != "mismatch" and table.device.type == "cpu":
        for name, side in zip(("student_tokens", "teacher_tokens"), sides, strict=True):
            _check_embedded(name, side)
    return sides


def _check_embedded(name: str, side: WindowSide) -> None:
    """Check that the table has a row for each id within the windows' lengths."""
    if (bad := side.valid & ((side.ids < 0) | (side.ids >= side.table.shape[0]))).any():
        raise ValueError(
            f"{name} must lie in [0, {side.table.shape[0]}), the rows of embedding, within the windows' lengths, got "
            f"{side.ids[bad][0].item()}"
        )


def _from_vectors(
    student_vectors: object, teacher_vectors: object, cost: str, student_lengths: object, teacher_lengths: object
) -> tuple[WindowSide, WindowSide]:
    """Check vectors in the place of tokens, and return both sides' windows, each with a table of its own."""
    if cost == "mismatch":
        raise ValueError('cost "mismatch" compares tokens, got vectors; pass student_tokens and teacher_tokens')
    student = check_tensor("student_vectors", student_vectors, dtype=FLOATING)
    teacher = check_tensor("teacher_vectors", teacher_vectors, dtype=FLOATING)
    for name, vectors in (("student_vectors", student), ("teacher_vectors", teacher)):
        if vectors.dim() != 3:
            raise ValueError(f"{name} must be [m, K, d], got {list(vectors.shape)}")
        _check_width(name, vectors.shape[1])
    shape = ((student.shape[0], teacher.shape[1], student.shape[2]), "m and d as in student_vectors")
    check_tensor("teacher_vectors", teacher, shape=shape, device=(student.device, "student_vectors"))

    return _side_of("student_lengths", student_lengths, student), _side_of("teacher_lengths", teacher_lengths, teacher)


def _side_of(name: str, lengths: object, vectors: Tensor) -> WindowSide:
    """Return vectors [m, K, d] as the windows of one side: their own table, each row named once."""
    m, window, width = vectors.shape
    ids = torch.arange(m * window, device=vectors.device).reshape(m, window)
    return WindowSide(vectors.reshape(m * window, width), ids, window_lengths(name, lengths, (m, window), vectors.device))
