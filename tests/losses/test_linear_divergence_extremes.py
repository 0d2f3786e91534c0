"""topd.linear_divergence where digits are easily lost: the logits are exact, the truth is float64 on those logits."""

import math
from dataclasses import replace

import pytest
import torch
from compare import DIVERGENCES, Model, Outcome, Problem, by_topd, plain
from score_truth import true_scores
from torch import Tensor

import topd

INF = math.inf
SMOOTH = [d for d in DIVERGENCES if d != topd.TotalVariation()]
KLS = [topd.ForwardKL(), topd.ReverseKL()]


def from_logits(student: Tensor, teacher: Tensor, divergence: topd.Divergence) -> Problem:
    """Rows [N, V] of logits through a hidden state of unit vectors: every product and sum of the head is exact."""
    eye = torch.eye(student.shape[0], dtype=student.dtype)
    return Problem(Model(eye, student.T.contiguous()), Model(eye, teacher.T.contiguous()), divergence)


def ones(problem: Problem) -> Tensor:
    return torch.ones_like(problem.student.hidden[:, 0])


def outcome(problem: Problem, backend: str) -> Outcome:
    """Value and the gradient to the logits [N, V], which is that of the weight."""
    outcome = by_topd(problem, backend, ones(problem), trainable=("weight",))
    return Outcome(outcome.value, {"logits": outcome.grads["weight"].T})


def truth_of(problem: Problem) -> Outcome:
    true = plain(problem, ones(problem), trainable=("weight",))
    return Outcome(true.value, {"logits": true.grads["weight"].T})


def from_biases(student: list[float], teacher: list[float], divergence: topd.Divergence, dtype=torch.float32) -> Problem:
    """One row whose logits are biases, which may be -inf."""
    nothing = torch.zeros(len(student), 1, dtype=dtype)
    sides = (Model(nothing[:1], nothing, torch.tensor(logits, dtype=dtype)) for logits in (student, teacher))
    return Problem(*sides, divergence)


def bias_outcome(problem: Problem, backend: str) -> tuple[float, Tensor]:
    outcome = by_topd(problem, backend, ones(problem), trainable=("bias", "hidden"))
    assert outcome.grads["hidden"].isfinite().all()
    return outcome.value.item(), outcome.grads["bias"].double().cpu()


def limit_gradient(problem: Problem) -> Tensor:
    """In float64 with logits of -600, a probability of 1e-260, for -inf."""

    def lowered(model: Model) -> Model:
        return replace(model.to(torch.float64), bias=model.bias.double().clamp(min=-600))

    limit = replace(problem, student=lowered(problem.student), teacher=lowered(problem.teacher))
    return plain(limit, ones(limit), trainable=("bias",)).grads["bias"].cpu()


FORBIDDEN = {
    "both sides": ([0.3, -INF, 1.0, -2.0], [1.0, -INF, -0.5, 0.1]),
    "student": ([0.3, -INF, 1.0, -2.0], [1.0, 0.2, -0.5, 0.1]),
    "teacher": ([0.3, 0.4, 1.0, -2.0], [1.0, -INF, -0.5, 0.1]),
    "one of each": ([0.3, -INF, 1.0, -2.0], [-INF, 0.7, -0.5, 0.1]),
    "disjoint": ([0.3, -INF, 1.0, -INF], [-INF, 0.7, -INF, 0.1]),
    "one entry left to each": ([-INF, -INF, 1.0, -INF], [-INF, -INF, 5.0, -INF]),
    "underflowing opposite": ([0.3, -INF, 1.0, -2.0], [1.0, -200.0, -0.5, 0.1]),
    "underflowing student": ([0.3, -200.0, 1.0, -2.0], [1.0, -INF, -0.5, 0.1]),
}


def is_infinite(problem: Problem) -> bool:
    student_zero, teacher_zero = problem.student.bias.isneginf(), problem.teacher.bias.isneginf()
    match problem.divergence:
        case topd.ForwardKL(entry_clip=None):
            return bool((student_zero & ~teacher_zero).any())
        case topd.ReverseKL():
            return bool((teacher_zero & ~student_zero).any())
    return False


@pytest.mark.parametrize("logits", FORBIDDEN.values(), ids=FORBIDDEN.keys())
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_probabilities_of_zero(divergence, logits, backend, device):
    """Infinite exactly where one side allows what the other forbids; then the forward KL's gradient is still
    p_S - p_T and the reverse KL's is 0. Everything else is the limit of ever smaller probabilities."""
    problem = from_biases(*logits, divergence).to(device)
    value, gradient = bias_outcome(problem, backend)
    true_value = plain(problem).value.item()
    assert math.isinf(true_value) == is_infinite(problem)
    assert value == pytest.approx(true_value, rel=1e-6, abs=1e-7)
    true_gradient = limit_gradient(problem)
    if divergence == topd.ReverseKL() and is_infinite(problem):
        true_gradient = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("entry_clip", [0.0, 0.05])
def test_the_entry_clip_at_infinity(entry_clip, backend, device):
    """p_S = (1, 0), p_T = (1/4, 3/4): entries (1/4) log(1/4) and inf, which counts as the clip and has no gradient."""
    problem = from_biases([0, -INF], [0, math.log(3)], topd.ForwardKL(entry_clip), torch.float64).to(device)
    value, gradient = bias_outcome(problem, backend)
    assert value == pytest.approx(-1 / 4 * math.log(4) + entry_clip, rel=1e-12)
    torch.testing.assert_close(gradient, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)


def test_scores_of_probabilities_of_zero(backend, device):
    """Infinite KLs, finite entropies, a log-probability of -inf, never NaN."""
    problem = from_biases([0, -INF, 0], [0, 0, -INF], topd.JSD(), torch.float64).to(device)
    sides = problem.student.hidden, problem.student.head(), problem.teacher.hidden, problem.teacher.head()
    tokens = torch.tensor([1], device=device)
    _, scores = topd.linear_divergence(*sides, tokens=tokens, return_scores=True, backend=backend)
    assert scores.forward_kl.item() == scores.reverse_kl.item() == INF
    assert scores.student_entropy.item() == pytest.approx(math.log(2), rel=1e-14)
    assert scores.teacher_entropy.item() == pytest.approx(math.log(2), rel=1e-14)
    assert scores.student_logprob.item() == -INF
    assert scores.teacher_logprob.item() == pytest.approx(-math.log(2), rel=1e-14)
    assert scores.top1_agreement.item() is True


def test_a_forbidden_token_makes_the_cross_entropy_infinite(backend, device):
    problem = from_biases([0, -INF, 0], [0, -INF, 1], topd.ReverseKL()).to(device)
    value, gradient = bias_outcome(replace(problem, tokens=torch.tensor([1], device=device), hard_weight=0.5), backend)
    assert value == INF
    assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_equal_sides_are_exactly_zero(divergence, backend, device):
    """Peaked, flat and one-hot rows beside themselves: a value and a gradient of 0 without any rounding."""
    rows = torch.stack([8 * torch.randn(50), torch.full((50,), 3.7), torch.eye(50)[7] * 1e4, torch.randn(50) * 1e-3])
    ours = outcome(from_logits(rows, rows, divergence).to(device), backend)
    assert not ours.value.any()
    assert not ours.grads["logits"].any()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_huge_one_hot_and_flat_logits(divergence, backend, device):
    """Up to 1e4 on either side, agreeing, disagreeing, beside flat rows and flat ones that stand at 1e4."""
    eye, flat = torch.eye(40), torch.zeros(1, 40)
    huge = torch.cat([1e4 * eye[:3], -1e4 * eye[:2], flat, flat + 1e4, flat - 1e4, 1e4 * torch.randn(4, 40)])
    student, teacher = huge.repeat_interleave(12, 0), huge.repeat(12, 1)
    problem = from_logits(student, teacher, divergence).to(device)
    ours, true = outcome(problem, backend), truth_of(problem)
    assert (ours.value >= min(0.0, true.value.min().item())).all()
    torch.testing.assert_close(ours.value.double(), true.value, rtol=1e-6, atol=1e-7)
    for row, true_row in zip(ours.grads["logits"], true.grads["logits"], strict=True):
        torch.testing.assert_close(row.double(), true_row, rtol=1e-4, atol=1e-6)


NEAR = torch.tensor(
    [1e-1, 1e-2, 1e-3, 5e-4, 2e-4, 1.5e-4]
)  # standard deviation of the logits' difference; KL = half its square


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != topd.ForwardKL(0.05)], ids=repr)
def test_near_equal_sides_keep_their_digits(divergence, backend, device):
    """Float32, V = 151,936: relative error under 1e-3 from KL 5e-3 down to 1e-8, never negative. The gradients, where
    a rounded log-normaliser shifts all entries alike, are as good, or no worse than eager torch's; the total
    variation's jumps at equality and is left out."""
    logits = 3 * torch.randn(len(NEAR), 151_936)
    teacher = logits + NEAR.unsqueeze(-1) * torch.randn(len(NEAR), 151_936)
    problem = from_logits(logits, teacher, divergence).to(device)
    ours, true = outcome(problem, backend), truth_of(problem)
    kl = truth_of(replace(problem, divergence=topd.ForwardKL())).value
    assert kl.min() < 1.2e-8
    assert (ours.value >= 0).all()
    assert ((ours.value - true.value).abs() / true.value).max() < 1e-3
    if divergence == topd.TotalVariation():
        return
    eager = plain(problem, ones(problem), trainable=("weight",), dtype=None).grads["weight"].T
    error, allowed = ((grad - true.grads["logits"]).norm(dim=-1) for grad in (ours.grads["logits"], eager))
    assert (error <= torch.maximum(allowed, 1e-3 * true.grads["logits"].norm(dim=-1))).all()


def peaked(gap: float, vocab: int = 64) -> Tensor:
    """A row with all but (vocab - 1) exp(-gap) of its probability on entry 9."""
    row = 0.3 * torch.randn(vocab)
    row[9] = gap
    return row


@pytest.mark.parametrize("divergence", KLS, ids=repr)
def test_peaked_rows_keep_the_digits_of_value_and_gradient(divergence, backend, device):
    """p = 1 - 1e-9 rounds to 1 in float32; the entry's gradient, the negative sum of all others, must not be lost."""
    student = torch.stack([peaked(gap) for gap in (15.0, 20.0, 25.0, 30.0)])
    teacher = torch.stack([peaked(gap) for gap in (16.0, 18.0, 25.5, 22.0)])
    problem = from_logits(student, teacher, divergence).to(device)
    ours, true = outcome(problem, backend), truth_of(problem)
    torch.testing.assert_close(ours.value.double(), true.value, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.grads["logits"].double(), true.grads["logits"], rtol=1e-3, atol=0)


def test_entropy_and_logprob_of_peaked_rows(backend, device):
    student = torch.stack([peaked(gap) for gap in (15.0, 20.0, 25.0)])
    problem = from_logits(student, student.flip(0), topd.ReverseKL()).to(device)
    sides = problem.student.hidden, problem.student.head(), problem.teacher.hidden, problem.teacher.head()
    tokens = torch.full((3,), 9, device=device)
    _, scores = topd.linear_divergence(*sides, tokens=tokens, return_scores=True, backend=backend)
    true = true_scores(replace(problem, tokens=tokens))
    for name in ("student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob"):
        torch.testing.assert_close(getattr(scores, name).double(), true[name], rtol=1e-4, atol=0)


def test_total_variation_takes_the_sign_of_zero_as_zero(backend, device):
    """p_S = (1/4, 1/4, 1/2), p_T = (1/4, 1/2, 1/4): sign (0, -1, 1), E = 1/4, gradient 1/2 p_S (sign - E)."""
    log2 = math.log(2)
    problem = from_biases([0, 0, log2], [0, log2, 0], topd.TotalVariation(), torch.float64).to(device)
    value, gradient = bias_outcome(problem, backend)
    assert value == pytest.approx(1 / 4, rel=1e-14)
    true = torch.tensor([-1 / 32, -5 / 32, 3 / 16], dtype=torch.float64)
    torch.testing.assert_close(gradient, true, rtol=1e-13, atol=0)


@pytest.mark.parametrize("logits", [[-INF, -INF], [0.0, math.nan], [0.0, INF]], ids=str)
def test_a_row_without_a_distribution_is_nan_not_a_number_that_looks_right(logits, backend, device):
    value = by_topd(from_biases([0.0, 1.0], logits, topd.ReverseKL()).to(device), backend).value
    assert value.isnan().all()


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "scores alone"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_row_without_a_distribution_agrees_with_nothing(side, trained, every_backend, device):
    """top1_agreement is False in row 1, where one side holds NaN, and True in the others, where both sides are one model. For
    scores alone Triton has a kernel of its own."""
    model = Model(torch.randn(3, 5), torch.randn(9, 5)).to(device)
    hidden = {"student": model.hidden.clone(), "teacher": model.hidden.clone()}
    hidden[side][1] = math.nan
    sides = hidden["student"].requires_grad_(trained), model.head(), hidden["teacher"], model.head()
    _, scores = topd.linear_divergence(*sides, return_scores=True, backend=every_backend)
    assert scores.top1_agreement.tolist() == [True, False, True]
    assert scores.forward_kl.isnan().tolist() == [False, True, False]
