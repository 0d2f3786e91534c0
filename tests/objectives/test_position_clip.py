"""OPDConfig(position_clip=c): min(D, c) of each token, without a gradient where c is the smaller, infinite tokens included."""

import pytest
import torch
from compare import assert_near
from objective_cases import backward
from pair_cases import batch_of, models
from topk_teacher_cases import with_topk

import topd
from topd.objectives.batch import Padded
from topd.objectives.inputs import Inputs
from topd.objectives.token_losses import token_losses


def own_side():
    return {key: value for key, value in batch_of().items() if not key.startswith("teacher_")}


def test_literal_values_and_which_were_clipped():
    """KL(p_S || p_T) of two coins: (1/2, 1/2) beside (1/2, 1/2), (1/4, 3/4) and (0, 1): 0, ln(2 / sqrt 3) and infinite."""
    response = torch.tensor([[False, True, True, True]])
    batch = Padded(torch.zeros(1, 4, dtype=torch.int64), attended=response, response=response)
    student = torch.zeros(1, 4, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.0, 1.0], [0.5, 0.5]]], dtype=torch.float64).log()
    identity = topd.Head(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    finite = teacher.masked_fill(teacher.isneginf(), -1e300)
    losses = token_losses((student, identity), (finite, identity), Inputs(batch), topd.OPDConfig(position_clip=0.1))
    small = torch.tensor(4 / 3).log().item() / 2
    assert losses.loss[0].tolist() == pytest.approx([0, 0, 0.1, 0.1])
    assert losses.unclipped[0, 2].item() == pytest.approx(small)
    assert ((losses.unclipped > 0.1) == torch.tensor([[False, False, True, True]])).all()
    assert not losses.unclipped.requires_grad
    losses.loss.sum().backward()
    assert (student.grad == 0).all()
    wide = token_losses((student, identity), (finite, identity), Inputs(batch), topd.OPDConfig(position_clip=0.2))
    wide.loss.sum().backward()
    assert (student.grad[0, [0, 2, 3]] == 0).all()
    assert student.grad[0, 1].abs().min() > 0.1


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_teachers_topk_is_clipped_too(reduction):
    """With all of the vocabulary it is the clipped OPD; infinite tokens are counted, and clipped as the others are."""
    student, teacher = models()
    batch = own_side()
    config = topd.OPDConfig("forward_kl", reduction=reduction, position_clip=0.1)
    expected = topd.OPD(student, teacher, config)(batch)
    gradient = backward(student, expected.loss)
    given = with_topk(batch, teacher, k=61)
    given = {key: value[..., :61] if "topk" in key else value for key, value in given.items()}
    step = topd.OPD(student, None, config)(given)
    assert_near(step.loss.detach(), expected.loss.detach(), 1e-10)
    assert_near(backward(student, step.loss), gradient, 1e-9)
    few = with_topk(batch, teacher)
    few["teacher_topk_logprobs"][0, 9, 1:] = -torch.inf
    few["teacher_topk_logprobs"][0, 9, 0] = 0.0
    step = topd.OPD(student, None, topd.OPDConfig(position_clip=0.1))(few)
    assert step.metrics["infinite_tokens"] == 1
    assert step.loss.isfinite()
    assert backward(student, step.loss).isfinite().all()


def test_a_clip_that_float32_does_not_hold_is_refused():
    student, teacher = (model.float() for model in models())
    with pytest.raises(ValueError, match=r"position_clip must be 0 or of magnitude .* got 1e-60"):
        topd.OPD(student, teacher, topd.OPDConfig(position_clip=1e-60))(batch_of())
