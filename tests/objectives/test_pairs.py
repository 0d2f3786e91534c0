"""A teacher who reads another prompt before the same response: value, gradient and scores beside full logits in float64."""

import pytest
import torch
from compare import assert_near, row_divergence
from objective_cases import backward, reduced
from pair_cases import batch_of, models, plain_losses

import topd


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", topd.JSD(0.3)], ids=str)
def test_value_gradient_and_scores_equal_the_plain_formula(divergence, reduction):
    student, teacher = models()
    batch = batch_of()
    step = topd.OPD(student, teacher, topd.OPDConfig(divergence, reduction=reduction))(batch)
    gradient = backward(student, step.loss)
    chosen = {"reverse_kl": topd.ReverseKL(), "forward_kl": topd.ForwardKL()}.get(divergence, divergence)
    losses = plain_losses(student, teacher, batch, lambda s, t: row_divergence(chosen, s, t))
    expected = reduced(losses, batch["response_mask"], reduction)
    assert_near(step.loss.detach(), expected.detach(), 1e-10, "loss")
    assert_near(gradient, backward(student, expected), 1e-10, "gradient")
    kl = plain_losses(student, teacher, batch, lambda s, t: row_divergence(topd.ReverseKL(), s, t))
    assert_near(step.scores.reverse_kl, kl.detach(), 1e-10, "scores")


def test_a_row_is_paired_with_its_own_row():
    student, teacher = models()
    batch = batch_of()
    for key, message in (
        (
            "teacher_response_mask",
            "teacher_response_mask must mark as many tokens as response_mask in each row, got 3 and 4 in row 2",
        ),
        (
            "teacher_input_ids",
            r"teacher_input_ids must repeat the response, got \d+ for \d+ at response token 0 of row 2; tokenize it once",
        ),
    ):
        wrong = batch[key].clone()
        column = int(batch["teacher_response_mask"][2].nonzero()[0])
        wrong[2, column] = 0 if wrong.dtype == torch.bool else (wrong[2, column] + 1) % 61
        with pytest.raises(ValueError, match=message):
            topd.OPD(student, teacher)(batch | {key: wrong})
