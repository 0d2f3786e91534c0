"""What topd.guidance_kl refuses, by name."""

import math
from typing import Any

import pytest
import torch
from refusals import Refusal, assert_refused

import topd
from topd import guidance_kl

M, K_S, K_T, V, H = 3, 5, 4, 19, 7


def call(**changes: Any) -> torch.Tensor:
    """A good call with some arguments exchanged."""
    good = {"window_hidden": torch.ones(M, K_S, H), "head": topd.Head(torch.ones(V, H))}
    good |= {"teacher_tokens": torch.zeros(M, K_T, dtype=torch.int64), "plan": torch.ones(M, K_S, K_T)}
    return guidance_kl(**(good | changes))


def with_entry(value: float) -> torch.Tensor:
    plan = torch.ones(M, K_S, K_T)
    plan[1, 2, 3] = value
    return plan


def with_zero_row() -> torch.Tensor:
    plan = torch.ones(M, K_S, K_T)
    plan[1, 2] = 0
    return plan


REFUSALS: dict[str, Refusal] = {
    "no head": (lambda: call(head=torch.ones(V, H)), TypeError, ["head", "topd.Head", "Tensor"]),
    "hidden no tensor": (lambda: call(window_hidden=[0.0]), TypeError, ["window_hidden", "Tensor", "list"]),
    "hidden int": (lambda: call(window_hidden=torch.ones(M, K_S, H).int()), TypeError, ["window_hidden", "float32", "int32"]),
    "hidden 2-D": (
        lambda: call(window_hidden=torch.ones(K_S, H)),
        ValueError,
        ["window_hidden", "[m, K_s, H]", f"[{K_S}, {H}]"],
    ),
    "hidden width": (
        lambda: call(window_hidden=torch.ones(M, K_S, 9)),
        ValueError,
        ["window_hidden", f"{H}]", "head.weight", "9]"],
    ),
    "hidden dtype": (
        lambda: call(window_hidden=torch.ones(M, K_S, H).half()),
        ValueError,
        ["window_hidden", "head.weight", "share a dtype", "float16", "cast"],
    ),
    "no tokens": (lambda: call(teacher_tokens=None), TypeError, ["teacher_tokens", "Tensor", "NoneType"]),
    "tokens int32": (lambda: call(teacher_tokens=torch.zeros(M, K_T).int()), TypeError, ["teacher_tokens", "int64", "int32"]),
    "tokens m": (
        lambda: call(teacher_tokens=torch.zeros(1, K_T).long()),
        ValueError,
        ["teacher_tokens", f"[{M}, K_t]", f"[1, {K_T}]"],
    ),
    "tokens 3-D": (
        lambda: call(teacher_tokens=torch.zeros(M, K_S, K_T).long()),
        ValueError,
        ["teacher_tokens", "K_t]", f"[{M}, {K_S}, {K_T}]"],
    ),
    "tokens device": (
        lambda: call(teacher_tokens=torch.zeros(M, K_T).long().to("meta")),
        ValueError,
        ["teacher_tokens", "meta", "cpu", "move"],
    ),
    "tokens outside": (
        lambda: call(teacher_tokens=torch.full((M, K_T), V)),
        ValueError,
        ["teacher_tokens", f"[0, {V})", "head.weight", f"got {V}"],
    ),
    "plan no tensor": (lambda: call(plan=[[[1.0]]]), TypeError, ["plan", "Tensor", "list"]),
    "plan int": (lambda: call(plan=torch.ones(M, K_S, K_T).long()), TypeError, ["plan", "float32", "int64"]),
    "plan shape": (
        lambda: call(plan=torch.ones(M, K_T, K_S)),
        ValueError,
        ["plan", f"[{M}, {K_S}, {K_T}]", f"[{M}, {K_T}, {K_S}]"],
    ),
    "plan device": (lambda: call(plan=torch.ones(M, K_S, K_T).to("meta")), ValueError, ["plan", "meta", "cpu", "move"]),
    "plan grad": (
        lambda: call(plan=torch.ones(M, K_S, K_T).requires_grad_()),
        ValueError,
        ["plan", "constant", "plan.detach()"],
    ),
    "plan negative": (lambda: call(plan=with_entry(-0.5)), ValueError, ["plan", ">= 0", "-0.5", "[1, 2, 3]"]),
    "plan nan": (lambda: call(plan=with_entry(math.nan)), ValueError, ["plan", "finite", "nan", "[1, 2, 3]"]),
    "plan inf": (lambda: call(plan=with_entry(math.inf)), ValueError, ["plan", "finite", "inf", "[1, 2, 3]"]),
    "plan zero row": (lambda: call(plan=with_zero_row()), ValueError, ["plan", "sum > 0", "[1, 2]"]),
    "lengths type": (lambda: call(student_lengths=[1] * M), TypeError, ["student_lengths", "Tensor", "list"]),
    "lengths int32": (lambda: call(student_lengths=torch.ones(M).int()), TypeError, ["student_lengths", "int64", "int32"]),
    "lengths shape": (lambda: call(student_lengths=torch.ones(2).long()), ValueError, ["student_lengths", f"[{M}]", "[2]"]),
    "lengths 0": (lambda: call(student_lengths=torch.zeros(M).long()), ValueError, ["student_lengths", f"[1, {K_S}]", "got 0"]),
    "lengths large": (
        lambda: call(student_lengths=torch.full((M,), 6)),
        ValueError,
        ["student_lengths", f"[1, {K_S}]", "got 6"],
    ),
    "temperature": (lambda: call(temperature=0.0), ValueError, ["temperature", "> 0", "0.0"]),
    "hint int": (lambda: call(weights_hint=torch.ones(M).long()), TypeError, ["weights_hint", "float32", "int64"]),
    "hint shape": (lambda: call(weights_hint=torch.ones(M, K_S)), ValueError, ["weights_hint", f"[{M}]", f"[{M}, {K_S}]"]),
    "workspace": (lambda: call(workspace_bytes=0), ValueError, ["workspace_bytes", "> 0", "0"]),
    "backend": (lambda: call(backend="cuda"), ValueError, ["backend", "'eager'", "'cuda'"]),
}


@pytest.mark.parametrize(("refused", "kind", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_names_the_argument_the_rule_and_what_came(refused, kind, words):
    assert_refused(refused, kind, words)


def test_a_good_call_beside_the_refusals():
    torch.testing.assert_close(call(), torch.full((M,), math.log(V)))
