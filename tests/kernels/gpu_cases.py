"""What the tests of topd on a GPU run on: real widths there, a few rows in Triton's interpreter where there is no GPU.

Truth is compare's, in float64 on the same numbers. Bounds: an error over the largest true entry may be that of the backend
"reference", eager torch whose formulas keep their digits, in float32, plus
    float32         5e-6: logits of magnitude 40 are themselves known to 40 * 6e-8 = 2.4e-6, and a GPU's exp adds as much again
    16 bits         for values the same, since logits are float32; for gradients 4 roundings more: dlogits are rounded once, the
                    result once, rows that were corrected once more each way, and half of float16's smallest number
Two kinds of gradients are known less well, whoever computes them (`open_parts`): the skewed KLs', where numbers of order 1
cancel, and the total variation's, whose sign is open where both probabilities are nearly equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import compare
import pytest
import torch
from compare import Outcome, Problem, random_problem
from torch import Tensor
from triton_cases import DEVICE

import topd

FLOAT32_CONSTANT = 5e-6
ROUNDINGS = 4
OPEN_SIGN = 1e-5  # a difference of log-probabilities that rounded logits of magnitude 40 leave open
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NARROW = DTYPES[1:]
WINDOW_VOCAB, WINDOW_WIDTH, PROBLEMS = (20_011, 256, 12) if DEVICE.type == "cuda" else (37, 8, 2)
SPREAD = 1.5  # of the logits, five times as much in every third row, so that the largest are about 40


@dataclass(frozen=True)
class Size:
    """Rows, the common vocabulary, the widths of both sides, the M ids of a row, and how many entries a larger vocabulary has
    that the other side lacks."""

    rows: int
    vocab: int
    student_width: int
    teacher_width: int
    ids: int = 50
    beyond: int = 70

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab}"

    @property
    def workspace_bytes(self) -> int:
        """Return a workspace that makes several chunks."""
        return 16 * (self.vocab + self.beyond) * max(1, self.rows // 3)


TINY = Size(4, 37, 8, 6, ids=3, beyond=6)
# The widths of models, one of them odd, for a few rows; and more rows than a program's, at an odd vocabulary and odd widths.
REAL = [Size(7, 49_152, 576, 576), Size(5, 151_936, 128, 96), Size(3, 50_257, 65, 33), Size(300, 20_011, 255, 192)]
SIZES = REAL if DEVICE.type == "cuda" else [TINY]
EACH_SIZE = pytest.mark.parametrize("size", SIZES, ids=str)


def on_device_only(cases: list[Any], others: int) -> list[Any]:
    """Return the cases that run here: all of them on a GPU, the first `others` in the interpreter."""
    return cases if DEVICE.type == "cuda" else cases[:others]


def problem_of(
    size: Size, options: dict[str, Any], dtype: torch.dtype, divergence: topd.Divergence = compare.DIVERGENCES[2]
) -> Problem:
    """Return compare's random problem of these options at the size, rounded to the dtype, on the device; its tokens are a
    column of a larger tensor."""
    sides = {}
    for side, width in (("student", size.student_width), ("teacher", size.teacher_width)):
        given = options.get(side, {})
        sides[side] = {**given, "width": width, "vocab": size.vocab + size.beyond * ("vocab" in given)}
    with DEVICE:
        problem = random_problem({**options, **sides}, divergence, n=size.rows, vocab=size.vocab)
    student, teacher = (
        replace(model, hidden=model.hidden * SPREAD / model.hidden.shape[-1] ** 0.5)
        for model in (problem.student, problem.teacher)
    )
    column = torch.stack([problem.tokens, problem.tokens], dim=1)[:, 0]
    return replace(problem, student=student, teacher=teacher, tokens=column).to(dtype)


def scores_of(problem: Problem, workspace_bytes: int | None, *, trainable: bool, backend: str = "triton") -> topd.TokenScores:
    """Return the scores beside a loss that is to be differentiated, or without gradients."""
    student = problem.student.leaves(("hidden",) if trainable else ())
    sides = student.hidden, student.head(), problem.teacher.hidden, problem.teacher.head()
    options = {name: value for name, value in problem.options().items() if name != "hard_weight"}
    options |= {"return_scores": True, "backend": backend, "workspace_bytes": workspace_bytes}
    _, scores = topd.linear_divergence(*sides, **options)
    return scores


def upstream_of(rows: int, number: int) -> Tensor:
    """Return upstream gradients that take different ways through backward: by turns one number for all rows, one number but for
    some rows, and any numbers."""
    one = torch.full((), 1.0 / rows, device=DEVICE).expand(rows)
    if number % 3 == 0:
        return one
    return one * (torch.arange(rows, device=DEVICE) % 4 != 0) if number % 3 == 1 else torch.randn(rows, device=DEVICE)


def windows_of(window: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return a table, then ids and lengths of both sides; half of the tokens are shared, some windows are shorter."""
    table = torch.randn(WINDOW_VOCAB, WINDOW_WIDTH) + torch.randn(1, WINDOW_WIDTH)
    ids = torch.randint(WINDOW_VOCAB, (2, PROBLEMS, max(window)))
    ids[1] = torch.where(torch.rand(ids[1].shape) < 0.5, ids[0].flip(-1), ids[1])
    sides = []
    for side, length in zip(ids, window, strict=True):
        lengths = torch.full((PROBLEMS,), length)
        lengths[1::2] = max(1, length - 3)
        sides += [side[:, :length].contiguous(), lengths]
    return table, *sides


def error_of(value: Tensor, true: Tensor) -> float:
    """Return the largest error over the largest true entry, as compare.assert_near judges it."""
    if not true.numel():
        return 0.0
    scale = true.abs().max().item()
    return (value.double() - true).abs().max().item() / scale if scale else 0.0


def assert_as_good(value: Tensor, yardstick: Tensor, true: Tensor, what: str, constant: float = FLOAT32_CONSTANT) -> None:
    """Check that a result is as near to the truth as the yardstick, but for the constant."""
    compare.assert_near(value.double(), true.double(), error_of(yardstick, true.double()) + constant, what)


def open_parts(problem: Problem, upstream: Tensor) -> dict[str, float]:
    """Return what float32's logits leave open of an element of the gradients, by name. In an entry of dlogits it is p_S times a
    float32's rounding where the gradient is p_S times a difference of numbers of order 1, and p_S itself where the total
    variation's sign is open."""
    kind = problem.divergence
    if not isinstance(kind, topd.SkewKL | topd.SkewReverseKL | topd.TotalVariation):
        return {}
    student, teacher = compare.both_logprobs(problem, problem.student.to(torch.float64), problem.teacher.to(torch.float64))
    p = student.exp()
    if isinstance(kind, topd.TotalVariation):
        open_ones = torch.where((teacher - student).abs() <= OPEN_SIGN, p, 0.0).sum(-1)
    else:
        open_ones = torch.finfo(torch.float32).eps * p.amax(-1)
    dlogits = (open_ones * upstream[compare.kept(problem)].abs()).max()
    factors = {"hidden": problem.student.weight, "weight": problem.student.hidden}
    return {name: (dlogits * factor.abs().max()).item() for name, factor in factors.items()}


def assert_outcome(
    outcome: Outcome, yardstick: Outcome, true: Outcome, dtype: torch.dtype, known_to: Mapping[str, float] | None = None
) -> None:
    """Check the value and every gradient by the bounds above; known_to: what `open_parts` returns."""
    assert_as_good(outcome.value, yardstick.value, true.value, "value")
    narrow = ROUNDINGS * torch.finfo(dtype).eps / 2 if dtype in NARROW else 0.0
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    assert outcome.grads.keys() == true.grads.keys()
    for name, gradient in true.grads.items():
        open_part = smallest + (known_to or {}).get(name, 0.0)
        constant = FLOAT32_CONSTANT + narrow + open_part / max(gradient.abs().max().item(), smallest)
        assert_as_good(outcome.grads[name], yardstick.grads[name], gradient, f"gradient of {name}", constant)
