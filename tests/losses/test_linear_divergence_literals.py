"""topd.linear_divergence: cases by hand."""

import math
from dataclasses import replace

import pytest
import torch
from compare import Model, Problem, by_topd

import topd

LOG2, LOG3 = math.log(2), math.log(3)

# p_S = (1/2, 1/2), p_T = (1/4, 3/4). The mixtures: JSD m = (3/8, 5/8); with beta 1/4 m = (7/16, 9/16); skew m = (0.475,
# 0.525); skew reverse m = (0.275, 0.725). The clip lets the entry (1/4) log(1/2) < 0 through and cuts (3/4) log(3/2).
LITERALS = {
    topd.ForwardKL(): 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2),
    topd.ForwardKL(entry_clip=0.1): -1 / 4 * LOG2 + 0.1,
    topd.ForwardKL(entry_clip=0.0): -1 / 4 * LOG2,
    topd.ReverseKL(): 1 / 2 * math.log(4 / 3),
    topd.JSD(): 1 / 2 * (1 / 4 * math.log(2 / 3) + 3 / 4 * math.log(6 / 5))
    + 1 / 2 * (1 / 2 * math.log(4 / 3) + 1 / 2 * math.log(4 / 5)),
    topd.JSD(beta=0.25): 1 / 4 * (1 / 4 * math.log(4 / 7) + 3 / 4 * math.log(4 / 3))
    + 3 / 4 * (1 / 2 * math.log(8 / 7) + 1 / 2 * math.log(8 / 9)),
    topd.SkewKL(): 1 / 4 * math.log(0.25 / 0.475) + 3 / 4 * math.log(0.75 / 0.525),
    topd.SkewReverseKL(): 1 / 2 * math.log(0.5 / 0.275) + 1 / 2 * math.log(0.5 / 0.725),
    topd.TotalVariation(): 1 / 4,
}


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_entries() -> tuple[Model, Model]:
    """Students and teachers with probabilities (1/2, 1/2) and (1/4, 3/4), two rows."""
    return Model(f64([[1], [1]]), f64([[0], [0]])), Model(f64([[1], [1]]), f64([[0], [LOG3]]))


def assert_literal(value, expected) -> None:
    torch.testing.assert_close(value.cpu(), f64(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", LITERALS, ids=repr)
def test_literal_values(divergence, backend, device):
    value = by_topd(Problem(*two_entries(), divergence).to(device), backend).value
    assert_literal(value, [LITERALS[divergence]] * 2)


@pytest.mark.parametrize(
    ("divergence", "gradient"),
    [
        (topd.ForwardKL(), 1 / 2 - 1 / 4),
        (topd.ForwardKL(entry_clip=0.1), 1 / 2 * 1 / 4 - 1 / 4),
        (topd.ReverseKL(), 1 / 4 * LOG3),
        (topd.TotalVariation(), 1 / 4),
    ],
    ids=repr,
)
def test_literal_gradients(divergence, gradient, backend, device):
    """To the two logits they are opposite; the upstream gradients are 1 and -2, so the weight's is -1 times it."""
    problem = Problem(*two_entries(), divergence).to(device)
    outcome = by_topd(problem, backend, torch.tensor([1, -2], device=device))
    assert_literal(outcome.grads["weight"], [[-gradient], [gradient]])


W = f64([[0], [LOG3]])

HEADS = {
    "temperature": (2.0, {"weight": 2 * W}),
    "scale": (1.0, {"weight": 4 * W, "scale": 0.25}),
    "softcap": (1.0, {"weight": W / LOG3 * 2 * math.atanh(LOG3 / 2), "softcap": 2.0}),
    "softcap before temperature": (0.5, {"weight": W / LOG3 * 2 * math.atanh(LOG3 / 4), "softcap": 2.0}),
    "bias": (1.0, {"weight": 0 * W, "bias": W[:, 0]}),
    "adapter": (1.0, {"weight": 0 * W, "a": f64([[1]]), "b": W / 4, "scaling": 4.0}),
    "all": (2.0, {"weight": W, "bias": W[:, 0], "a": f64([[1]]), "b": W, "scaling": 2.0, "scale": 0.5}),
}


@pytest.mark.parametrize(("temperature", "teacher"), HEADS.values(), ids=HEADS.keys())
def test_literal_heads(temperature, teacher, backend, device):
    """Each head's logits over the temperature are (0, log 3)."""
    student, _ = two_entries()
    problem = Problem(student, Model(f64([[1], [1]]), **teacher), temperature=temperature).to(device)
    assert_literal(by_topd(problem, backend).value, [LITERALS[topd.ReverseKL()]] * 2)


def test_literal_hard_weight_and_mask(backend, device):
    """A row with p_S(token) = 1/2 gains hard_weight log 2; a masked row is exactly 0 and its token -100 is not read."""
    problem = Problem(*two_entries(), mask=torch.tensor([True, False]), tokens=torch.tensor([1, -100]), hard_weight=3.0)
    value = by_topd(problem.to(device), backend).value
    assert value[0].item() == pytest.approx(LITERALS[topd.ReverseKL()] + 3 * LOG2, rel=1e-12)
    assert value[1].item() == 0


@pytest.mark.parametrize("student_is_larger", [False, True])
def test_literal_unequal_vocabularies(student_is_larger, backend, device):
    """A third entry of weight 4 beside (1, 3) is cut off and the rest renormalised; that side lost a mass of 1/2."""
    small, large = (model.to(device) for model in two_entries())
    large = replace(large, weight=f64([[0], [LOG3], [math.log(4)]]).to(device))
    student, teacher = (large, small) if student_is_larger else (small, large)
    sides = student.hidden, student.head(), teacher.hidden, teacher.head()
    _, scores = topd.linear_divergence(*sides, tokens=torch.tensor([1, 0], device=device), return_scores=True, backend=backend)
    of_large, of_small = ("student", "teacher") if student_is_larger else ("teacher", "student")
    to_small, to_large = ("reverse", "forward") if student_is_larger else ("forward", "reverse")
    truth = {
        f"{to_small}_kl": [LITERALS[topd.ForwardKL()]] * 2,
        f"{to_large}_kl": [LITERALS[topd.ReverseKL()]] * 2,
        f"{of_large}_logprob": [math.log(3 / 4), math.log(1 / 4)],
        f"{of_small}_logprob": [-LOG2, -LOG2],
        f"{of_large}_lost_mass": [0.5, 0.5],
        f"{of_small}_lost_mass": [0, 0],
        f"{of_large}_entropy": [1 / 4 * math.log(4) + 3 / 4 * math.log(4 / 3)] * 2,
        f"{of_small}_entropy": [LOG2, LOG2],
    }
    for name, expected in truth.items():
        assert_literal(getattr(scores, name), expected)
