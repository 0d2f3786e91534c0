"""With num_items the gradients of micro-batches add up to the large batch's: in a plain loop, packed, under accelerate."""

import pytest
import torch
from compare import assert_near
from loss_module import Loss
from tiny_models import flat_gradient
from trainer_cases import FEW, four_rollouts, models

import topd
from topd.integrations.rollouts import pack_rollouts

accelerate = pytest.importorskip("accelerate")


def halves(batch):
    """Responses of 22 and of 4 tokens."""
    return [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]


def items_of(batch, reduction):
    response = batch["response_mask"] > 0
    return response.sum() if reduction == "token" else response.any(-1).sum()


def whole_gradient(objective, batch):
    objective.student.zero_grad()
    objective(batch).loss.backward()
    gradient = flat_gradient(objective.student)
    objective.student.zero_grad()
    return gradient


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("way", ["padded", "packed", "accelerate"])
def test_gradients_add_up_to_the_large_batchs(way, reduction):
    objective, batch = topd.OPD(*models(), topd.OPDConfig(reduction=reduction)), four_rollouts()
    expected, num_items = whole_gradient(objective, batch), items_of(batch, reduction)
    if way == "accelerate":
        accelerator = accelerate.Accelerator(cpu=True)
        model = accelerator.prepare(Loss(objective))
        for part in halves(batch):
            accelerator.backward(model(part, num_items))
    else:
        for part in halves(batch):
            objective(pack_rollouts(part) if way == "packed" else part, num_items=num_items).loss.backward()
    assert_near(flat_gradient(objective.student), expected, 1e-9)


def test_without_num_items_they_do_not():
    """A mean of means: what the tests above would miss if both halves had equally many tokens."""
    objective, batch = topd.OPD(*models()), four_rollouts()
    expected = whole_gradient(objective, batch)
    for part in halves(batch):
        (objective(part).loss / 2).backward()
    off = (flat_gradient(objective.student) - expected).abs().max() / expected.abs().max()
    assert off > 0.01


def test_topds_guidance_is_that_of_each_part_by_its_share_of_the_tokens():
    student, teacher = models()
    config = topd.TOPDConfig(window_temperature=0.0, **FEW)
    objective, batch = topd.TOPD(student, teacher, config), four_rollouts()
    num_items = items_of(batch, "token")
    for part in halves(batch):
        alone, share = objective(part), items_of(part, "token") / num_items
        result = objective(part, num_items=num_items)
        assert_near(result.loss.detach(), (share * alone.loss).detach().double(), 1e-6)
        assert torch.equal(result.near_future.divergent, alone.near_future.divergent)
