"""Numbers that overflow or vanish in the dtype of a call are refused by name; float64, which holds them, takes them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topd

N, H, V, M = 4, 3, 7, 2


def low_rank(scaling: float, dtype: torch.dtype) -> topd.LowRank:
    return topd.LowRank(torch.randn(2, H, dtype=dtype), torch.randn(V, 2, dtype=dtype), scaling)


def student_with(dtype: torch.dtype, name: str, value: float) -> topd.Head:
    weight = torch.randn(V, H, dtype=dtype)
    return topd.Head(weight, adapter=low_rank(value, dtype)) if name == "scaling" else topd.Head(weight, **{name: value})


def divergence(dtype: torch.dtype, student: topd.Head | None = None, **options: Any) -> Tensor:
    plain = topd.Head(torch.randn(V, H, dtype=dtype))
    hidden, tokens = torch.randn(2, N, H, dtype=dtype), torch.zeros(N, dtype=torch.int64)
    return topd.linear_divergence(hidden[0], student or plain, hidden[1], plain, tokens=tokens, **options)


def logprobs(dtype: torch.dtype, head: topd.Head | None = None, **options: Any) -> Tensor:
    head = head or topd.Head(torch.randn(V, H, dtype=dtype))
    return topd.linear_logprobs(torch.randn(N, H, dtype=dtype), head, torch.zeros(N, M, dtype=torch.int64), **options)


def topk(dtype: torch.dtype, **options: Any) -> Tensor:
    return topd.topk_logprobs(torch.randn(N, H, dtype=dtype), topd.Head(torch.randn(V, H, dtype=dtype)), 2, **options)[1]


def entropy_aware(dtype: torch.dtype, **options: Any) -> Tensor:
    hidden, heads = torch.randn(2, N, H, dtype=dtype), [topd.Head(torch.randn(V, H, dtype=dtype)) for _ in range(2)]
    return topd.entropy_aware_opd(hidden[0], heads[0], hidden[1], heads[1], top_k=2, entropy_threshold=0.0, **options)


CASES: dict[str, tuple[str, Callable[[torch.dtype], Tensor]]] = {
    "temperature 1e39": ("temperature", lambda d: divergence(d, temperature=1e39)),
    "temperature 1e-39": ("temperature", lambda d: divergence(d, temperature=1e-39)),
    "hard_weight 1e39": ("hard_weight", lambda d: divergence(d, hard_weight=1e39)),
    "hard_weight 1e-42": ("hard_weight", lambda d: divergence(d, hard_weight=1e-42)),
    "entry clip 1e39": ("entry_clip of 'forward_kl'", lambda d: divergence(d, divergence=topd.ForwardKL(1e39))),
    "beta 1e-40": ("beta of 'jsd'", lambda d: divergence(d, divergence=topd.JSD(1e-40))),
    "softcap 1e39": ("student.softcap", lambda d: divergence(d, student_with(d, "softcap", 1e39))),
    "softcap 1e-39": ("student.softcap", lambda d: divergence(d, student_with(d, "softcap", 1e-39))),
    "scale 1e39": ("student.scale", lambda d: divergence(d, student_with(d, "scale", -1e39))),
    "scaling 1e39": ("student.adapter.scaling", lambda d: divergence(d, student_with(d, "scaling", 1e39))),
    "scale over temperature": (
        "student.scale / temperature",
        lambda d: divergence(d, student_with(d, "scale", 1e20), temperature=1e-20),
    ),
    "softcap over temperature": (
        "student.softcap / temperature",
        lambda d: divergence(d, student_with(d, "softcap", 1e20), temperature=1e-20),
    ),
    "log-probabilities, temperature": ("temperature", lambda d: logprobs(d, temperature=1e-39)),
    "log-probabilities, softcap": ("head.softcap", lambda d: logprobs(d, student_with(d, "softcap", 1e39))),
    "top k, temperature": ("temperature", lambda d: topk(d, temperature=1e39)),
    "entropy-aware, coef": ("coef", lambda d: entropy_aware(d, coef=1e39)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "run"), CASES.values(), ids=CASES.keys())
def test_what_float32_does_not_hold_is_refused_by_name(name, run, dtype):
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*float32.*float64"):
        run(dtype)


@pytest.mark.parametrize(("name", "run"), CASES.values(), ids=CASES.keys())
def test_float64_takes_it(name, run):
    assert run(torch.float64).isfinite().all()


def test_one_side_of_float64_makes_the_call_one():
    hidden, teacher = torch.randn(N, H), torch.randn(N, H).double()
    heads = topd.Head(torch.randn(V, H)), topd.Head(torch.randn(V, H).double())
    assert topd.linear_divergence(hidden, heads[0], teacher, heads[1], temperature=1e39).dtype == torch.float64


@pytest.mark.parametrize("zero", ["hard_weight", "scale", "entry clip"])
def test_zero_is_a_number_that_float32_holds(zero):
    options: dict[str, dict[str, Any]] = {
        "hard_weight": {"hard_weight": 0.0},
        "scale": {"student": student_with(torch.float32, "scale", 0.0)},
        "entry clip": {"divergence": topd.ForwardKL(0.0)},
    }
    assert divergence(torch.float32, **options[zero]).isfinite().all()
