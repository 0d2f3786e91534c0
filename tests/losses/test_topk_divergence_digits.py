"""topd.topk_divergence keeps its digits: tails far below the resolution, near-equal sides, signs."""

import math

import compare
import pytest
import torch
from compare import Model, outcome_of, random_model
from topk_cases import N, V, both_directions, by_topd, from_probabilities, truth

import topd


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sharp_student(gap: float) -> tuple[Model, torch.Tensor]:
    """float32; in each of 16 rows tokens 0 and 1 hold all but about exp(-gap) of the mass. And their ids."""
    bias = torch.full((300,), -gap - math.log(300))
    bias[:2] = torch.tensor([0.0, -0.5])
    return Model(0.3 * torch.randn(16, 7), 0.3 * torch.randn(300, 7), bias), torch.tensor([[0, 1]]).expand(16, -1)


@both_directions
@pytest.mark.parametrize("gap", [24.0, 40.0, 80.0])
def test_the_students_tail_keeps_its_digits(gap, direction, backend, device):
    """1e-10 and far below float32's resolution of 1. The teacher's two tokens leave 0.1: the value leans on the log of the
    tail (forward) or holds next to nothing of it (reverse)."""
    model, ids = sharp_student(gap)
    model, ids = model.to(device), ids.to(device)
    logprobs = f64([[0.6, 0.3]]).log().to(device).expand(16, -1)
    options = {"direction": direction, "support": "tail"}
    outcome, true = by_topd(model, ids, logprobs, backend=backend, **options), truth(model, ids, logprobs, **options)
    compare.assert_near(outcome.value, true.value, 5e-7, "value")
    for name, gradient in true.grads.items():
        compare.assert_near(outcome.grads[name], gradient, 5e-6, f"gradient of {name}")


@both_directions
@pytest.mark.parametrize("gap", [24.0, 40.0])
def test_tails_of_both_sides_keep_their_digits(gap, direction, backend, device):
    """One token, of which both sides are sure: the divergence is that of the two tails, the teacher's 1e-12 from float64
    log-probabilities. The truth is taken in float64 from the tails themselves, where 1 - p would have none of its digits."""
    bias = torch.full((300,), -gap - math.log(300))
    bias[0] = 0.0
    model = Model(0.3 * torch.randn(16, 7), 0.3 * torch.randn(300, 7), bias).to(device)
    tail = torch.full((16,), 1e-12, dtype=torch.float64, device=device)
    ids, logprobs = torch.zeros(16, 1, dtype=torch.int64, device=device), torch.log1p(-tail).unsqueeze(-1)

    def true(leaves: Model) -> torch.Tensor:
        s = leaves.logits().log_softmax(-1)[..., 1:].logsumexp(-1)
        here, there = (tail.log(), s) if direction == "forward" else (s, tail.log())
        known_here, known_there = torch.log1p(-here.exp()), torch.log1p(-there.exp())
        return here.exp() * (here - there) + here.expm1().neg() * (known_here - known_there)

    outcome = by_topd(model, ids, logprobs, direction=direction, backend=backend)
    expected = outcome_of(model, torch.float64, true)
    assert 0 < expected.value.max() < 1e-8
    assert ((outcome.value.double() - expected.value) / expected.value).abs().max() < 5e-6
    if backend != "reference":  # its backward is the textbook's, where a token of probability 1 cancels
        for name, gradient in expected.grads.items():
            compare.assert_near(outcome.grads[name], gradient, 5e-6, f"gradient of {name}")


@both_directions
@pytest.mark.parametrize("support", ["renormalised", "tail"])
def test_digits_where_student_and_teacher_almost_agree(direction, support, backend, device):
    """Log-ratios of about 1e-4, KLs of about 5e-9, float32: log-probabilities are off by 1e-7."""
    model = Model(0.2 * torch.randn(64, 7), torch.randn(50, 7)).to(device)
    own = model.to(torch.float64).logits().log_softmax(-1)
    logprobs, ids = (own + 1e-4 * torch.randn_like(own)).log_softmax(-1).topk(20, dim=-1)
    options = {"direction": direction, "support": support}
    true = from_probabilities(model.to(torch.float64), ids, logprobs, **options)
    assert 1e-10 < true.median() < 1e-8
    value = topd.topk_divergence(model.hidden, model.head(), ids, logprobs, backend=backend, **options)
    relative = ((value.double() - true) / true).abs()
    assert relative.median() < 1e-3
    assert relative.max() < 1e-2


@both_directions
@pytest.mark.parametrize("support", ["renormalised", "tail"])
def test_renormalised_and_tail_are_never_negative(direction, support, backend, device):
    """A student that has the teacher's float32 log-probabilities itself."""
    model = random_model(200, 12, 4).to(device).to(torch.float32)
    logprobs, ids = model.logits().log_softmax(-1).topk(5, dim=-1)
    value = topd.topk_divergence(
        model.hidden, model.head(), ids, logprobs, direction=direction, support=support, backend=backend
    )
    finite = value[value.isfinite()]
    assert finite.numel() >= 100
    assert finite.min() >= 0
    assert finite.max() < 1e-6


def test_raw_may_be_negative(backend):
    """Forward: a teacher with half the student's mass on each token. Reverse: one who is sure where the student is not."""
    model = random_model(N, V, 7)
    own = model.logits().log_softmax(-1)
    options = {"support": "raw", "backend": backend}
    top, ids = own.topk(3, dim=-1)
    value = topd.topk_divergence(model.hidden, model.head(), ids, top - math.log(2), direction="forward", **options)
    torch.testing.assert_close(value, -math.log(2) / 2 * top.exp().sum(-1), rtol=1e-11, atol=0)
    least, ids = own.topk(3, dim=-1, largest=False)
    logprobs = torch.full_like(least, -math.log(3))
    value = topd.topk_divergence(model.hidden, model.head(), ids, logprobs, direction="reverse", **options)
    torch.testing.assert_close(value, (least.exp() * (least + math.log(3))).sum(-1), rtol=1e-11, atol=1e-15)
    assert value.min() < -1e-6


@pytest.mark.parametrize("gap", [20.0, 40.0])
def test_a_raw_reverse_kl_keeps_its_digits_where_the_student_has_next_to_no_mass(gap, backend):
    """p log(p / q) alone, p = exp(-gap) / (1 + exp(-gap)), beside a q of 0.9."""
    head = topd.Head(f64([[0], [-gap]]))
    log_p = -gap - math.log1p(math.exp(-gap))
    value = topd.topk_divergence(
        f64([[1]]), head, torch.tensor([[1]]), f64([[0.9]]).log(), direction="reverse", support="raw", backend=backend
    )
    assert value.item() == pytest.approx(math.exp(log_p) * (log_p - math.log(0.9)), rel=1e-12, abs=0)
