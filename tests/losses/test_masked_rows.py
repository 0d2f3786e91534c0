"""Masked rows get exactly 0 gradient, and leave the head's alone, whatever upstream gradient comes: NaN and inf too."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import compare
import pytest
import torch
from compare import DIVERGENCES, TENSORS, Model, random_model, random_problem
from torch import Tensor

import topd

N, M, V = 12, 3, 19
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)
FULL = {"student": {"bias": True, "rank": 2}, "teacher": {"bias": True}, "hard_weight": 0.3, "mask": True}


def gradients(student: Model, compute: Callable[[Model], Tensor], upstream: Tensor) -> dict[str, Tensor]:
    leaves = student.leaves(TENSORS)
    compute(leaves).backward(upstream)
    return {name: getattr(leaves, name).grad for name in TENSORS if getattr(leaves, name) is not None}


def assert_masked_rows_count_nothing(student: Model, compute: Callable[[Model], Tensor], mask: Tensor, *bad: float) -> None:
    """Check that the gradients with a bad upstream gradient in masked rows, each of the bad numbers in turn, are those with 0
    there, bit for bit, also where an unmasked row's is 0."""
    with torch.no_grad():
        upstream = torch.randn_like(compute(student))
    kept = mask.reshape(mask.shape + (1,) * (upstream.dim() - mask.dim()))
    upstream[mask.nonzero()[0, 0]] = 0
    clean = gradients(student, compute, upstream.masked_fill(~kept, 0.0))
    assert all(gradient.any() for gradient in clean.values())
    for number in bad:
        spoilt = gradients(student, compute, upstream.masked_fill(~kept, number))
        assert not spoilt["hidden"][~mask].any()
        assert not spoilt["hidden"][mask.nonzero()[0, 0]].any()
        for name, expected in clean.items():
            assert torch.equal(spoilt[name], expected), (name, number)


@pytest.mark.parametrize("hint", [None, 1.0, *NOT_FINITE])
def test_linear_divergence(hint, every_backend, device):
    """Without a hint, and with one that has 1 or what is not finite in the masked rows."""
    problem = random_problem(FULL, n=N, vocab=V).to(device).to(torch.float32)
    teacher = problem.teacher.hidden, problem.teacher.head()
    options: dict[str, Any] = problem.options() | {"backend": every_backend}
    if hint is not None:
        options["weights_hint"] = torch.ones(N, device=device).masked_fill(~problem.mask, hint)
    bad = NOT_FINITE if hint in (None, 1.0) else (hint,)
    assert_masked_rows_count_nothing(
        problem.student, lambda s: topd.linear_divergence(s.hidden, s.head(), *teacher, **options), problem.mask, *bad
    )


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_every_divergence(divergence, backend, device):
    problem = random_problem(FULL, divergence, n=N, vocab=V).to(device)
    teacher, options = (problem.teacher.hidden, problem.teacher.head()), problem.options() | {"backend": backend}
    assert_masked_rows_count_nothing(
        problem.student, lambda s: topd.linear_divergence(s.hidden, s.head(), *teacher, **options), problem.mask, torch.nan
    )


@pytest.mark.parametrize("of_head", [True, False], ids=["head too", "hidden alone"])
def test_a_mean_over_no_token_has_no_gradient(of_head, every_backend, device):
    """per_token.sum() / mask.sum() is NaN where no token is a response, and its upstream gradient inf: all are masked."""
    problem = random_problem(FULL, n=N, vocab=V).to(device)
    problem = replace(problem, mask=torch.zeros_like(problem.mask), tokens=torch.full_like(problem.tokens, -100))
    student = problem.student.leaves(TENSORS if of_head else ("hidden",))
    sides = student.hidden, student.head(), problem.teacher.hidden, problem.teacher.head()
    per_token = topd.linear_divergence(*sides, **problem.options(), backend=every_backend)
    (per_token.sum() / problem.mask.sum()).backward()
    for name in TENSORS if of_head else ("hidden",):
        grad = getattr(student, name).grad
        assert grad.isfinite().all(), name
        assert not grad.any(), name


def test_entropy_aware_opd(every_backend, device):
    """Rows where the teacher is undecided and others, masked and not."""
    student, teacher = (random_model(N, V, 7, bias=True, rank=2).to(device).to(torch.float32) for _ in range(2))
    mask = torch.arange(N, device=device) % 3 != 1
    options = {"top_k": 4, "mask": mask, "backend": every_backend}

    def compute(s: Model) -> Tensor:
        return topd.entropy_aware_opd(s.hidden, s.head(), teacher.hidden, teacher.head(), **options)

    assert_masked_rows_count_nothing(student, compute, mask, *NOT_FINITE)


@pytest.mark.parametrize("name", ["linear_logprobs", "soft_target_kl", "topk forward", "topk reverse"])
def test_what_is_composed_on_log_probabilities(name, every_backend, device):
    student = random_model(N, V, 7, bias=True, rank=2).to(device).to(torch.float32)
    mask = torch.arange(N, device=device) % 3 != 1
    ids = torch.rand(N, V, device=device).argsort(-1)[:, :M]
    logprobs = torch.randn(N, M, device=device).log_softmax(-1) - 0.1
    options: dict[str, Any] = {"mask": mask, "backend": every_backend}

    def compute(s: Model) -> Tensor:
        head = s.head()
        if name == "linear_logprobs":
            return topd.linear_logprobs(s.hidden, head, ids, **options)
        if name == "soft_target_kl":
            return topd.soft_target_kl(s.hidden, head, ids, logprobs.exp(), normalize=True, **options)
        return topd.topk_divergence(s.hidden, head, ids, logprobs, direction=name.split()[1], **options)

    assert_masked_rows_count_nothing(student, compute, mask, *NOT_FINITE)


def test_an_unmasked_row_still_tells(every_backend, device):
    """A bad upstream gradient of a row that counts spoils its own gradient and the head's: a broken batch is seen."""
    problem = random_problem(FULL, n=N, vocab=V).to(device)
    row = int(problem.mask.nonzero()[1, 0])
    upstream = torch.ones(N, dtype=torch.float64, device=device)
    upstream[row] = torch.nan
    grads = compare.by_topd(problem, every_backend, upstream).grads
    assert grads["hidden"][row].isnan().all()
    assert grads["hidden"][torch.arange(N, device=device) != row].isfinite().all()
    assert grads["weight"].isnan().all()
