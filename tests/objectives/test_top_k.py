"""OPDConfig(top_k=k): both sides renormalised on the teacher's k tokens, in value, gradient and digits."""

import math

import pytest
import torch
from compare import assert_near, row_divergence
from objective_cases import backward
from pair_cases import batch_of, loss_of, models, plain_losses, reduced
from tiny_models import tiny

import topd
from topd.objectives.rows import Rows
from topd.objectives.top_k import compare_top_k

DIVERGENCES = ["forward_kl", "reverse_kl", topd.JSD(0.25)]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def compared(student, teacher, k, config, mask=None, without=((), ())):
    """Return the loss of rows of logits [n, V], and the gradient of their sum to the student's; tokens that a side is `without`
    have probability 0 there."""
    student = student.clone().requires_grad_()
    vocab = student.shape[-1]
    biases = [torch.zeros(vocab, dtype=student.dtype).index_fill(0, torch.tensor(ids).long(), -math.inf) for ids in without]
    heads = [topd.Head(torch.eye(vocab, dtype=student.dtype), bias) for bias in biases]
    tokens = torch.arange(len(student)) % vocab
    loss, _ = compare_top_k(Rows(student, teacher, mask, tokens, None, lambda value: value), *heads, k, config)
    (gradient,) = torch.autograd.grad(loss[loss.isfinite()].sum(), student)
    return loss.detach(), gradient


# Of the teacher (1/16, 5/8, 1/16, 1/4) tokens 1 and 3 are the likeliest: (5/7, 2/7). The student there: (1/4, 1/8), (2/3, 1/3).
FORWARD = 5 / 7 * math.log(15 / 14) + 2 / 7 * math.log(6 / 7)
REVERSE = 2 / 3 * math.log(14 / 15) + 1 / 3 * math.log(7 / 6)
MIXED = [3 / 4 * 2 / 3 + 1 / 4 * 5 / 7, 3 / 4 * 1 / 3 + 1 / 4 * 2 / 7]
JSD = 1 / 4 * sum(t * math.log(t / m) for t, m in zip((5 / 7, 2 / 7), MIXED, strict=True)) + 3 / 4 * sum(
    s * math.log(s / m) for s, m in zip((2 / 3, 1 / 3), MIXED, strict=True)
)


@pytest.mark.parametrize(("divergence", "value"), list(zip(DIVERGENCES, (FORWARD, REVERSE, JSD), strict=True)), ids=str)
def test_literal_values(divergence, value):
    student, teacher = f64([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log(), f64([[1 / 16, 5 / 8, 1 / 16, 1 / 4]]).log()
    loss, gradient = compared(student, teacher, 2, topd.OPDConfig(divergence, top_k=2))
    torch.testing.assert_close(loss, f64([value]), rtol=1e-12, atol=0)
    assert (gradient[0, [0, 2]] == 0).all()
    assert gradient.sum().abs() < 1e-15
    one, flat = compared(student, teacher, 1, topd.OPDConfig(divergence, top_k=1))
    assert 0 <= one < 1e-30
    assert (flat == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "reduction": "sequence"}], ids=str)
@pytest.mark.parametrize("k", [1, 5, 61])
def test_value_and_gradient_equal_the_plain_formula(k, options, divergence):
    student, teacher = models()
    config, batch = topd.TRDConfig(divergence, top_k=k, **options), batch_of()
    step = topd.TRD(student, teacher, config)(batch)
    gradient = backward(student, step.loss)
    losses = plain_losses(student, teacher, batch, loss_of(config), config.temperature)
    expected = reduced(losses, config.reduction)
    torch.testing.assert_close(step.loss.detach(), expected.detach(), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(gradient, backward(student, expected), rtol=1e-8, atol=1e-13)


def test_hard_weight_and_scores_are_of_the_whole_vocabulary():
    student, teacher = models()
    batch = batch_of()
    whole = topd.OPD(student, teacher, topd.OPDConfig())(batch)
    plain = topd.OPD(student, teacher, topd.OPDConfig(top_k=5))(batch)
    step = topd.OPD(student, teacher, topd.OPDConfig(top_k=5, hard_weight=0.3))(batch)
    nll = -whole.scores.student_logprob.sum() / batch["response_mask"].sum()
    assert_near(step.loss.detach(), plain.loss.detach() + 0.3 * nll, 1e-12)
    for name in ("forward_kl", "reverse_kl", "teacher_entropy", "student_logprob"):
        assert_near(getattr(plain.scores, name), getattr(whole.scores, name), 1e-12, name)
    logits = [torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    (value, gradient), (plain, flat) = (compared(*logits, 5, topd.OPDConfig(top_k=5, hard_weight=w)) for w in (0.3, 0.0))
    p, own = logits[0].softmax(-1), torch.eye(9, dtype=torch.float64)[:6]
    assert_near(value, plain - 0.3 * p.log()[own > 0], 1e-13)
    assert_near(gradient, flat + 0.3 * (p - own), 1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_near_equal_sides_keep_their_digits(divergence):
    """To second order each is a multiple of sum p d^2, d the difference of the logits around its mean."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    moved = 1e-5 * torch.randn(6, 9, generator=generator, dtype=torch.float64)
    loss, _ = compared(teacher + moved, teacher, 9, topd.OPDConfig(divergence, top_k=9))
    p = teacher.softmax(-1)
    variance = (p * (moved - (p * moved).sum(-1, keepdim=True)).square()).sum(-1)
    factor = 0.25 * 0.75 if isinstance(divergence, topd.JSD) else 1.0
    torch.testing.assert_close(loss, factor * variance / 2, rtol=1e-4, atol=0)
    equal, gradient = compared(teacher, teacher, 9, topd.OPDConfig(divergence, top_k=9))
    assert (equal >= 0).all()
    assert equal.max() < 1e-30
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_impossible_tokens(divergence):
    """A teacher of fewer tokens than k counts those alone; a student without any of them is infinite, without a gradient."""
    config, mask = topd.OPDConfig(divergence, top_k=3), torch.tensor([True, False])
    student, teacher = f64([[0.2, 0.4, 0.5, 0.1], [0.3, 0.0, 0.2, 0.0]]), f64([[0.3, 0.0, 0.1, 0.9]] * 2)
    loss, gradient = compared(student, teacher, 3, config, mask, without=([], [1, 3]))
    named = {"forward_kl": topd.ForwardKL(), "reverse_kl": topd.ReverseKL()}.get(divergence, divergence)
    both = (each[:1, [0, 2]].log_softmax(-1) for each in (student, teacher))
    torch.testing.assert_close(loss[:1], row_divergence(named, *both), rtol=1e-12, atol=0)
    assert loss[1] == 0
    assert gradient[0].isfinite().all()
    assert (gradient[0, [1, 3]] == 0).all()
    assert (gradient[1] == 0).all()
    loss, gradient = compared(student, teacher, 3, config, mask, without=([0, 2], [1, 3]))
    assert loss.tolist() == [math.inf, 0]
    assert (gradient == 0).all()
    loss, gradient = compared(student, teacher, 3, config, mask, without=([0], [3]))
    assert gradient.isfinite().all()
    assert loss[0].isfinite() == (divergence != "forward_kl")


def test_the_common_vocabulary_bounds_k():
    student, teacher = models()[0], tiny("qwen3", seed=3, vocab_size=70, initializer_range=0.06).double()

    def objective(k):
        return topd.OPD(student, teacher, topd.OPDConfig(top_k=k), allow_unequal_vocabularies=True)

    with pytest.raises(
        ValueError, match=r"config\.top_k must be at most the 61 tokens that both models have, got 62; None comp"
    ):
        objective(62)(batch_of())
    whole = topd.OPD(student, teacher, allow_unequal_vocabularies=True)(batch_of())
    assert_near(objective(61)(batch_of()).loss.detach(), whole.loss.detach(), 1e-10)


def test_a_teacher_of_the_batch_takes_no_top_k_and_topd_does():
    student, teacher = models()
    with pytest.raises(ValueError, match=r"config\.top_k chooses among a teacher model's tokens, got 4 and teacher=None"):
        topd.OPD(student, None, topd.OPDConfig("forward_kl", top_k=4))
    own = {key: value for key, value in batch_of().items() if not key.startswith("teacher_")}
    options = {"top_k": 4, "position_clip": 0.02}
    config = topd.TOPDConfig(candidates="top_k", candidate_value=1, horizon=3, guidance_weight=0.0, **options)
    step = topd.TOPD(student, teacher, config)(own)
    expected = topd.OPD(student, teacher, topd.OPDConfig(**options))(own)
    assert torch.equal(step.loss, expected.loss)
    assert step.loss < topd.OPD(student, teacher, topd.OPDConfig(top_k=4))(own).loss
