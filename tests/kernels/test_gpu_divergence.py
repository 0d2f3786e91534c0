"""linear_divergence and its scores on "triton" beside float64: at the widths of models on a GPU, small in the interpreter."""

import math
from typing import Any

import compare
import pytest
import torch
from compare import by_topd, plain
from gpu_cases import (
    DTYPES,
    EACH_SIZE,
    SIZES,
    Size,
    assert_as_good,
    assert_outcome,
    on_device_only,
    open_parts,
    problem_of,
    scores_of,
    upstream_of,
)
from score_truth import true_scores
from torch import Tensor
from triton_cases import DEVICE, NEEDS_TRITON

import topd
from topd_kernels import register

pytestmark = NEEDS_TRITON

Case = tuple[str, topd.Divergence, torch.dtype]
REVERSE, JSD = topd.ReverseKL(), topd.JSD()
# Those of the interpreter come first.
CASES: list[Case] = [
    ("everything", REVERSE, torch.float32),
    ("everything", REVERSE, torch.bfloat16),
    *(("plain", divergence, dtype) for divergence in (REVERSE, JSD) for dtype in DTYPES),
    *(("plain", divergence, torch.float32) for divergence in compare.DIVERGENCES if divergence not in (REVERSE, JSD)),
    *(
        (name, REVERSE, torch.float32)
        for name in compare.OPTIONS
        if name not in ("plain", "everything", "softcap", "hard_weight")
    ),
    *((name, JSD, torch.float32) for name in ("softcap", "hard_weight", "everything")),
    ("everything", JSD, torch.float16),
]
HERE = on_device_only(CASES, 8)


def check_divergence(size: Size, case: Case, number: int) -> None:
    name, divergence, dtype = case
    problem, upstream = problem_of(size, compare.OPTIONS[name], dtype, divergence), upstream_of(size.rows, number)
    true = plain(problem.to(torch.float64), upstream)
    yardstick = by_topd(problem.to(torch.float32), "reference", upstream)
    outcome = by_topd(problem, "triton", upstream, workspace_bytes=size.workspace_bytes)
    assert_outcome(outcome, yardstick, true, dtype, open_parts(problem, upstream))


@EACH_SIZE
@pytest.mark.parametrize("number", range(len(HERE)), ids=[f"{name} {d} {dtype}" for name, d, dtype in HERE])
def test_values_and_gradients(number, size):
    check_divergence(size, HERE[number], number)


def check_scores(size: Size, options: dict[str, Any], dtype: torch.dtype) -> None:
    problem = problem_of(size, options, dtype)
    scores = scores_of(problem, size.workspace_bytes, trainable=True)
    yardstick = scores_of(problem.to(torch.float32), None, trainable=False, backend="reference")
    for name, expected in true_scores(problem).items():
        assert_as_good(getattr(scores, name), getattr(yardstick, name), expected, name)


SCORED = [
    ("everything", torch.float32),
    ("everything", torch.bfloat16),
    ("plain", torch.float32),
    ("teacher_larger", torch.float16),
    ("student_larger", torch.bfloat16),
    ("plain", torch.float16),
]


@EACH_SIZE
@pytest.mark.parametrize(("name", "dtype"), on_device_only(SCORED, 3), ids=str)
def test_scores(name, dtype, size):
    check_scores(size, compare.OPTIONS[name], dtype)


def from_logits(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    """Return the divergence [N] of rows of logits: products with the identity are exact."""
    unit, heads = torch.eye(len(student), device=DEVICE), [topd.Head(side.T.contiguous()) for side in (student, teacher)]
    return topd.linear_divergence(unit, heads[0], unit, heads[1], divergence=name, backend="triton")


def check_near_equal(size: Size, name: str) -> None:
    """A KL of 1e-7 keeps its digits, row by row, where the usual formula has none left. The bound is ten times what the sum of
    p (expm1(-d) + d) is known to reach at 2.5e-8."""
    student = 2 * torch.randn(min(size.rows, 32), size.vocab, device=DEVICE)
    teacher = student + math.sqrt(2e-7) * torch.randn_like(student)
    p, q = (side.double().log_softmax(-1) for side in (student, teacher))
    if name == "forward_kl":
        p, q = q, p
    d = p - q
    true = (p.exp() * (torch.expm1(-d) + d)).sum(-1)
    relative = from_logits(student, teacher, name).double() / true
    assert ((relative - 1).abs() <= 3e-4).all(), relative


@EACH_SIZE
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_nearly_equal_sides_keep_their_digits(name, size):
    check_near_equal(size, name)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's kernels are the dispatcher's, which has no test double")
@pytest.mark.parametrize(
    ("result", "check"),
    [
        (0, lambda: check_divergence(SIZES[0], CASES[0], 0)),
        (0, lambda: check_near_equal(SIZES[0], "reverse_kl")),
        (1, lambda: check_scores(SIZES[0], {}, torch.float32)),
    ],
    ids=["values", "near-equal sides", "scores"],
)
def test_a_wrong_kernel_is_noticed(result, check, monkeypatch):
    """A thousandth too much in one of its results is more than any bound allows."""
    right = register.LAUNCHERS["divergence_rows"]

    def wrong(*arguments):
        results = right(*arguments)
        results[result].mul_(1.001)
        return results

    check()
    monkeypatch.setitem(register.LAUNCHERS, "divergence_rows", wrong)
    with pytest.raises(AssertionError):
        check()
