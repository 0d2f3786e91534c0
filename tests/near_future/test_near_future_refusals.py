"""What topd.near_future_divergence refuses, by name."""

import math
from typing import Any

import pytest
import torch
from near_future_cases import D, V
from refusals import Refusal, assert_refused

import topd
from topd import near_future_divergence

linprog = pytest.importorskip("scipy.optimize").linprog
linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
ot = pytest.importorskip("ot")


def call(**changes: Any) -> topd.Transport:
    """A good call with some arguments exchanged."""
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    return near_future_divergence(
        **({"student_tokens": tokens, "teacher_tokens": tokens.clone(), "embedding": torch.ones(V, D)} | changes)
    )


def of_vectors(**changes: Any) -> topd.Transport:
    return near_future_divergence(
        **({"student_vectors": torch.ones(2, 3, D), "teacher_vectors": torch.ones(2, 4, D)} | changes)
    )


def ints(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value)


REFUSALS: dict[str, Refusal] = {
    "cost": (lambda: call(cost="euclidean"), ValueError, ["cost", "'cosine'", "'sqeuclidean'", "'mismatch'", "'euclidean'"]),
    "cost type": (lambda: call(cost=None), ValueError, ["cost", "'cosine'", "None"]),
    "solver": (lambda: call(solver="emd"), ValueError, ["solver", "'sinkhorn'", "'exact'", "'emd'"]),
    "epsilon 0": (lambda: call(epsilon=0.0), ValueError, ["epsilon", "> 0", "0.0"]),
    "epsilon nan": (lambda: call(epsilon=math.nan), ValueError, ["epsilon", "finite", "nan"]),
    "epsilon type": (lambda: call(epsilon="0.1"), TypeError, ["epsilon", "number", "str"]),
    "tolerance negative": (lambda: call(tolerance=-1.0), ValueError, ["tolerance", "> 0", "-1.0"]),
    "tolerance type": (lambda: call(tolerance=None), TypeError, ["tolerance", "number", "NoneType"]),
    "iterations 0": (lambda: call(max_iterations=0), ValueError, ["max_iterations", "> 0", "got 0"]),
    "iterations type": (lambda: call(max_iterations=10.0), TypeError, ["max_iterations", "int", "float"]),
    "no student": (lambda: call(student_tokens=None), TypeError, ["student_tokens", "Tensor", "NoneType"]),
    "no teacher": (lambda: call(teacher_tokens=None), TypeError, ["teacher_tokens", "Tensor", "NoneType"]),
    "tokens int32": (lambda: call(student_tokens=ints(2, 3).int()), TypeError, ["student_tokens", "int64", "int32", "cast"]),
    "tokens float": (lambda: call(teacher_tokens=torch.ones(2, 3)), TypeError, ["teacher_tokens", "int64", "float32"]),
    "tokens 1-D": (lambda: call(student_tokens=ints(3)), ValueError, ["student_tokens", "[m, K]", "[3]"]),
    "teacher 3-D": (lambda: call(teacher_tokens=ints(2, 3, 1)), ValueError, ["teacher_tokens", "[m, K]", "[2, 3, 1]"]),
    "window 0": (lambda: call(student_tokens=ints(2, 0)), ValueError, ["student_tokens", "1 to 128", "got 0"]),
    "window 129": (lambda: call(teacher_tokens=ints(2, 129)), ValueError, ["teacher_tokens", "1 to 128", "got 129"]),
    "m": (lambda: call(teacher_tokens=ints(4, 3)), ValueError, ["teacher_tokens", "[2, 3]", "student_tokens", "[4, 3]"]),
    "teacher device": (
        lambda: call(teacher_tokens=ints(2, 3).to("meta")),
        ValueError,
        ["teacher_tokens", "meta", "cpu", "move"],
    ),
    "no embedding": (lambda: call(embedding=None), TypeError, ["embedding", "Tensor", "NoneType"]),
    "embedding int": (lambda: call(embedding=ints(V, D)), TypeError, ["embedding", "float32", "int64"]),
    "embedding 3-D": (lambda: call(embedding=torch.ones(1, V, D)), ValueError, ["embedding", "[V, d]", f"[1, {V}, {D}]"]),
    "embedding device": (lambda: call(embedding=torch.ones(V, D).to("meta")), ValueError, ["embedding", "meta", "cpu", "move"]),
    "student id": (lambda: call(student_tokens=ints(2, 3, value=V)), ValueError, ["student_tokens", f"[0, {V})", f"got {V}"]),
    "teacher id": (lambda: call(teacher_tokens=ints(2, 3, value=-1)), ValueError, ["teacher_tokens", f"[0, {V})", "got -1"]),
    "lengths type": (lambda: call(student_lengths=[3, 3]), TypeError, ["student_lengths", "Tensor", "list"]),
    "lengths int32": (lambda: call(teacher_lengths=ints(2, value=3).int()), TypeError, ["teacher_lengths", "int64", "int32"]),
    "lengths shape": (lambda: call(student_lengths=ints(3, value=3)), ValueError, ["student_lengths", "[2]", "[3]"]),
    "lengths 0": (lambda: call(student_lengths=torch.tensor([3, 0])), ValueError, ["student_lengths", "[1, 3]", "got 0"]),
    "lengths large": (lambda: call(teacher_lengths=torch.tensor([4, 3])), ValueError, ["teacher_lengths", "[1, 3]", "got 4"]),
    "lengths device": (
        lambda: call(student_lengths=ints(2).to("meta")),
        ValueError,
        ["student_lengths", "meta", "cpu", "move"],
    ),
    "tokens and vectors": (
        lambda: call(student_vectors=torch.ones(2, 3, D)),
        ValueError,
        ["tokens", "student_vectors", "both"],
    ),
    "vectors and table": (lambda: of_vectors(embedding=torch.ones(V, D)), ValueError, ["embedding", "student_vectors", "both"]),
    "one side's vectors": (lambda: of_vectors(teacher_vectors=None), TypeError, ["teacher_vectors", "Tensor", "NoneType"]),
    "vectors of mismatch": (lambda: of_vectors(cost="mismatch"), ValueError, ["mismatch", "vectors", "student_tokens"]),
    "vectors int": (lambda: of_vectors(student_vectors=ints(2, 3, D)), TypeError, ["student_vectors", "float32", "int64"]),
    "vectors 2-D": (
        lambda: of_vectors(student_vectors=torch.ones(3, D)),
        ValueError,
        ["student_vectors", "[m, K, d]", "[3, 6]"],
    ),
    "vectors m": (
        lambda: of_vectors(teacher_vectors=torch.ones(1, 4, D)),
        ValueError,
        ["teacher_vectors", "[2, 4, 6]", "[1, 4, 6]"],
    ),
    "vectors d": (
        lambda: of_vectors(teacher_vectors=torch.ones(2, 4, 5)),
        ValueError,
        ["teacher_vectors", "[2, 4, 6]", "[2, 4, 5]"],
    ),
    "vectors window": (
        lambda: of_vectors(teacher_vectors=torch.ones(2, 0, D)),
        ValueError,
        ["teacher_vectors", "1 to 128", "got 0"],
    ),
    "vectors lengths": (
        lambda: of_vectors(teacher_lengths=torch.tensor([5, 1])),
        ValueError,
        ["teacher_lengths", "[1, 4]", "got 5"],
    ),
    "vectors device": (
        lambda: of_vectors(teacher_vectors=torch.ones(2, 4, D).to("meta")),
        ValueError,
        ["teacher_vectors", "meta", "cpu", "move"],
    ),
}


@pytest.mark.parametrize(("refused", "kind", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_names_the_argument_the_rule_and_what_came(refused, kind, words):
    assert_refused(refused, kind, words)


def test_good_calls_beside_the_refusals():
    assert call().distance.shape == of_vectors().distance.shape == (2,)


@pytest.mark.parametrize(("package", "module", "k_teacher"), [("scipy", "scipy.optimize", 3), ("POT", "ot", 4)])
def test_exact_without_its_package_says_what_to_install(monkeypatch, package, module, k_teacher):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "topd\[transport\]"'):
        call(teacher_tokens=ints(2, k_teacher), solver="exact")
