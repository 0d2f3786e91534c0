"""Near future: optimal transport between a student's and a teacher's continuation of one prefix, and guidance by its plan.

The score of TOPD (arXiv 2606.00305): D_OT = min <P, C> over plans between the two windows' tokens, both uniformly weighted. A
plan's rows are student positions, its columns teacher positions.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from topd.backends import choose_backend
from topd.checks.values import choice, floating, on_device, positive_int, real, shaped, tensor
from topd.head import Head
from topd.losses.operands import check_side, typed
from topd.losses.soft_targets import check_ids_in_vocabulary, check_targets, checks_values, soft_target_kl
from topd.near_future.exact import exact_transport
from topd.ops.transport.op import run_transport
from topd.ops.transport.spec import COSTS, MAX_WINDOW, Windows
from topd.options import BackendName, Cost, Solver

SOLVERS: tuple[str, ...] = get_args(Solver)


@dataclass(frozen=True, eq=False)
class Transport:
    """What `near_future_divergence` finds of each pair of windows; constants.

    Attributes:
        distance: [m] <P, C>, without the entropy term, in the unit of the cost.
        plan: [m, K_s, K_t], rows student positions, columns teacher positions; rows sum to 1 / student length, columns to
            1 / teacher length; 0 past the lengths.
        marginal_error: [m] the largest |row or column sum - its marginal| that the iteration left, in units of the marginal,
            before the plan was rounded onto its marginals; 0 for the exact solver.
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
    """Optimal-transport distance and plan between m pairs of short windows of tokens.

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
    found = run_transport(backend, student, teacher, cost, epsilon, max_iterations=max_iterations, tolerance=tolerance)
    return Transport(*found)


def _lengths(name: str, lengths: object, ids: Tensor) -> Tensor:
    m, window = ids.shape
    if lengths is None:
        return torch.full((m,), window, dtype=torch.int64, device=ids.device)
    checked = on_device(
        name, shaped(name, typed(name, lengths, torch.int64), (m,), "one for each window"), ids.device, "windows"
    )
    if checked.device.type == "cpu" and ((checked < 1) | (checked > window)).any():
        bad = checked[(checked < 1) | (checked > window)][0].item()
        raise ValueError(f"{name} must lie in [1, {window}], the windows' width, got {bad}")
    return checked


def _check_window(name: str, width: int) -> None:
    if not 1 <= width <= MAX_WINDOW:
        raise ValueError(f"{name} must hold windows of 1 to {MAX_WINDOW} tokens, got {width}")


def _from_tokens(
    student_tokens: object,
    teacher_tokens: object,
    embedding: object,
    cost: str,
    student_lengths: object,
    teacher_lengths: object,
) -> tuple[Windows, Windows]:
    student = typed("student_tokens", student_tokens, torch.int64)
    teacher = typed("teacher_tokens", teacher_tokens, torch.int64)
    for name, tokens in (("student_tokens", student), ("teacher_tokens", teacher)):
        if tokens.dim() != 2:
            raise ValueError(f"{name} must be [m, K], got {list(tokens.shape)}")
        _check_window(name, tokens.shape[1])
    shaped("teacher_tokens", teacher, (student.shape[0], teacher.shape[1]), "m as in student_tokens")
    on_device("teacher_tokens", teacher, student.device, "student_tokens")
    sides = [
        (student, _lengths("student_lengths", student_lengths, student), "student_tokens"),
        (teacher, _lengths("teacher_lengths", teacher_lengths, teacher), "teacher_tokens"),
    ]
    if cost == "mismatch" and embedding is None:
        embedding = torch.empty((0, 1), device=student.device)
    table = floating("embedding", embedding)
    if table.dim() != 2:
        raise ValueError(f"embedding must be [V, d], got {list(table.shape)}")
    on_device("embedding", table, student.device, "student_tokens")
    for ids, lengths, name in sides if cost != "mismatch" and table.device.type == "cpu" else []:
        counted = torch.arange(ids.shape[1]) < lengths.unsqueeze(-1)
        if (bad := counted & ((ids < 0) | (ids >= table.shape[0]))).any():
            raise ValueError(
                f"{name} must lie in [0, {table.shape[0]}), the rows of embedding, within the windows' lengths, got "
                f"{ids[bad][0].item()}"
            )
    first, second = (Windows(table, ids, lengths) for ids, lengths, _ in sides)
    return first, second


def _from_vectors(
    student_vectors: object, teacher_vectors: object, cost: str, student_lengths: object, teacher_lengths: object
) -> tuple[Windows, Windows]:
    if cost == "mismatch":
        raise ValueError('cost "mismatch" compares tokens, got vectors; pass student_tokens and teacher_tokens')
    student = floating("student_vectors", student_vectors)
    teacher = floating("teacher_vectors", teacher_vectors)
    for name, vectors in (("student_vectors", student), ("teacher_vectors", teacher)):
        if vectors.dim() != 3:
            raise ValueError(f"{name} must be [m, K, d], got {list(vectors.shape)}")
        _check_window(name, vectors.shape[1])
    expected = (student.shape[0], teacher.shape[1], student.shape[2])
    shaped("teacher_vectors", teacher, expected, "m and d as in student_vectors")
    on_device("teacher_vectors", teacher, student.device, "student_vectors")

    def windows(vectors: Tensor, lengths: object, name: str) -> Windows:
        m, window, width = vectors.shape
        ids = torch.arange(m * window, device=vectors.device).reshape(m, window)
        return Windows(vectors.reshape(m * window, width), ids, _lengths(name, lengths, ids))

    return windows(student, student_lengths, "student_lengths"), windows(teacher, teacher_lengths, "teacher_lengths")


def guidance_kl(
    window_hidden: Tensor,
    head: Head,
    teacher_tokens: Tensor,
    plan: Tensor,
    *,
    student_lengths: Tensor | None = None,
    temperature: float = 1.0,
    weights_hint: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """The multi-token guidance of a divergent point: the mean over the student's window of KL(target_i || p_S), where target_i
    spreads row i of the plan, normalised, over the teacher's tokens. A token that stands at several places counts once.

    Args:
        window_hidden: [m, K_s, H] floating, the states that predict each token of the student's windows; differentiated.
        head: the student's Head.
        teacher_tokens: [m, K_t] int64; where the plan is 0 they are never read.
        plan: [m, K_s, K_t] floating, >= 0, constant, as `near_future_divergence` returns it.
        student_lengths: [m] int64, 1 <= length <= K_s; positions at and past it contribute 0. None: all of the window counts.
        temperature: > 0, of the student.
        weights_hint: [m] floating, what the result will be multiplied by, up to one factor: speed alone.
        workspace_bytes, backend: as in `linear_logprobs`.

    Returns:
        [m] float32 (float64 for float64), nats; 3 matrix products over m K_s rows (2 with a frozen head).

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device, range or option; on the CPU also a row of the plan within the
            lengths that sums to 0.

    Source: arXiv 2606.00305, L_traj with uniform marginals.
    """
    check_side("window_hidden", window_hidden, "head", head)
    states = tensor("window_hidden", window_hidden)
    if states.dim() != 3:
        raise ValueError(f"window_hidden must be [m, K_s, H], got {list(states.shape)}")
    m, window, _ = states.shape
    tokens = typed("teacher_tokens", teacher_tokens, torch.int64)
    if tokens.dim() != 2 or tokens.shape[0] != m:
        raise ValueError(f"teacher_tokens must be [{m}, K_t], m as in window_hidden, got {list(tokens.shape)}")
    on_device("teacher_tokens", tokens, states.device, "window_hidden")
    weights = shaped("plan", floating("plan", plan), (m, window, tokens.shape[1]), "[m, K_s, K_t]")
    on_device("plan", weights, states.device, "window_hidden")
    if weights.requires_grad:
        raise ValueError("plan must not require grad: it is a constant; pass plan.detach()")
    lengths = _lengths("student_lengths", student_lengths, torch.empty((m, window), device=states.device))
    valid = torch.arange(window, device=states.device) < lengths.unsqueeze(-1)
    lengths = lengths.clamp_min(1)  # windows of no token have a mean of 0
    if checks_values(states):
        weights = weights.masked_fill(~valid.unsqueeze(-1), 0.0)
        check_targets("plan", weights, valid, normalize=True)
        check_ids_in_vocabulary("teacher_tokens", tokens, (weights != 0).any(1), head.weight.shape[0])
    hint = None if weights_hint is None else _row_hint(weights_hint, lengths, window)
    per_position = soft_target_kl(
        states,
        head,
        tokens.unsqueeze(1).expand(m, window, tokens.shape[1]),
        weights,
        normalize=True,
        temperature=temperature,
        mask=valid,
        weights_hint=hint if hint is not None else (valid / lengths.unsqueeze(-1)),
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    return per_position.sum(-1) / lengths


def _row_hint(hint: object, lengths: Tensor, window: int) -> Tensor:
    """[m, K_s] from one weight a window."""
    checked = shaped("weights_hint", floating("weights_hint", hint), tuple(lengths.shape), "one for each window")
    on_device("weights_hint", checked, lengths.device, "window_hidden")
    return (checked / lengths).unsqueeze(-1).expand(lengths.shape[0], window)
