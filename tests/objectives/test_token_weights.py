"""token_weights and verdict: a weight multiplies a token's loss and never enters the denominator; a verdict changes nothing."""

import pytest
import torch
from compare import assert_near
from matrix_products import H, N, V, matrix_products
from objective_cases import backward
from pair_cases import batch_of, loss_of, models, plain_losses
from topk_teacher_cases import with_topk

import topd
from topd.integrations.rollouts import pack_rollouts
from topd.objectives.batch import Padded
from topd.objectives.inputs import Inputs, check_inputs
from topd.objectives.reduction import reduce_tokens
from topd.objectives.token_losses import token_losses

FEW = {"candidates": "top_k", "candidate_value": 2, "horizon": 4}


def weighted(batch, seed=0):
    """Return the batch with weights, NaN where they are not read, and a weight of 0 at a response token."""
    response = batch["response_mask"] > 0
    weights = 2 * torch.rand(response.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights[tuple(response.nonzero()[1])] = 0.0
    return batch | {"token_weights": weights.masked_fill(~response, torch.nan)}


def own_side(layout):
    return {key: value for key, value in batch_of(layout).items() if not key.startswith("teacher_")}


def test_two_tokens_by_hand():
    """Losses 3 and 5, weights 2 and 0.5: the mean of 6 and 2.5 over two tokens; an infinite token of no weight adds nothing."""
    response = torch.tensor([[False, True, True]])
    batch = Padded(torch.zeros(1, 3, dtype=torch.int64), attended=response, response=response)
    losses, weights = torch.tensor([[0.0, 3.0, 5.0]]), torch.tensor([[0.0, 2.0, 0.5]])
    for reduction in ("token", "sequence"):
        assert reduce_tokens(losses, batch, reduction, None, weights).loss == 4.25
    assert reduce_tokens(losses, batch, "token", 10, weights).loss == torch.tensor(0.85)
    infinite = torch.tensor([[0.0, 3.0, torch.inf]])
    assert reduce_tokens(infinite, batch, "token", None, torch.tensor([[0.0, 2.0, 0.0]])).loss == 3


@pytest.mark.parametrize("layout", ["pair", "gaps", "packed"])
@pytest.mark.parametrize("config", [topd.TRDConfig(), topd.TRDConfig(reduction="sequence"), topd.TRDConfig(top_k=4)], ids=str)
def test_pairs_by_the_plain_formula(config, layout):
    student, teacher = models()
    batch = weighted(batch_of(layout))
    step = topd.TRD(student, teacher, config)(batch)
    gradient = backward(student, step.loss)
    losses = plain_losses(student, teacher, batch, loss_of(config))
    inside = batch["token_weights"][batch["response_mask"] > 0].split([each.numel() for each in losses])
    products = [loss * weight for loss, weight in zip(losses, inside, strict=True)]
    expected = torch.cat(products).mean()
    if config.reduction == "sequence":
        expected = torch.stack([each.mean() for each in products if each.numel()]).mean()
    assert_near(step.loss.detach(), expected.detach(), 1e-10)
    assert_near(gradient, backward(student, expected), 1e-10)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_every_way_of_opd_weighs_alike(reduction):
    """Padded, packed, of a teacher's whole top-k; the scores and the metrics that are not losses stay."""
    student, teacher = models()
    batch = weighted(own_side("left"))
    step = topd.OPD(student, teacher, topd.OPDConfig(reduction=reduction))(batch)
    gradient = backward(student, step.loss)
    plain = topd.OPD(student, teacher)(own_side("left"))
    assert torch.equal(step.scores.reverse_kl, plain.scores.reverse_kl)
    assert step.metrics["student_entropy"] == plain.metrics["student_entropy"]
    packed = topd.OPD(student, teacher, topd.OPDConfig(reduction=reduction))(pack_rollouts(batch))
    assert_near(packed.loss.detach(), step.loss.detach(), 1e-12)
    assert_near(backward(student, packed.loss), gradient, 1e-11)
    topk = with_topk(batch, teacher, k=61)
    topk = {key: value[..., :61] if "topk" in key else value for key, value in topk.items()}
    for support in ("tail", "raw"):
        config = topd.OPDConfig(reduction=reduction, topk_support=support)
        other = topd.OPD(student, None, config)(topk)
        assert_near(other.loss.detach(), step.loss.detach(), 1e-10)
        assert_near(backward(student, other.loss), gradient, 1e-9)


@pytest.mark.parametrize("mode", ["keep", "cap", "mask"])
def test_topd_multiplies_them_with_the_false_alarms(mode):
    student, teacher = models()
    config = topd.TOPDConfig(false_alarms=mode, **FEW)
    batch = weighted(own_side("left"))

    def step(given):
        return topd.TOPD(student, teacher, config)(given, generator=torch.Generator().manual_seed(0))

    plain, objective = step(own_side("left")), step(batch)
    future = objective.near_future
    weights = batch["token_weights"].nan_to_num(0.0)
    if mode != "keep":
        mask, positions, loss = batch["response_mask"] > 0, future.windows.positions, objective.scores.reverse_kl
        weights = weights * topd.false_alarm_weights(loss, positions, future.divergent, mask=mask, mode=mode)
    expected = (objective.scores.reverse_kl * weights).sum() / batch["response_mask"].sum()
    assert_near(objective.metrics["opd_loss"], expected, 1e-6)
    assert objective.metrics["guidance_loss"] == plain.metrics["guidance_loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_fewer_digits_is_taken_as_it_is(dtype):
    student, teacher = models()
    batch = batch_of()
    halves = torch.full(batch["input_ids"].shape, 0.5, dtype=dtype)
    step = topd.TRD(student, teacher)(batch | {"token_weights": halves})
    assert_near(step.loss.detach(), 0.5 * topd.TRD(student, teacher)(batch).loss.detach(), 1e-14)
    assert step.loss.dtype == torch.float64


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_weights_cost_no_matrix_product(reduction):
    """They are what the backward pass expects."""
    torch.manual_seed(0)
    hidden = torch.randn(1, N + 1, H, requires_grad=True)
    head, teacher = topd.Head(torch.randn(V, H, requires_grad=True)), (torch.randn(1, N + 1, H), topd.Head(torch.randn(V, H)))
    every = torch.ones(1, N + 1, dtype=torch.bool)
    rollouts = Padded(torch.randint(V, (1, N + 1)), attended=every, response=every)
    config = topd.OPDConfig(reduction=reduction)

    def products(weights):
        inputs = Inputs(rollouts, None, weights)

        def step():
            loss = token_losses((hidden, head), teacher, inputs, config).loss
            reduce_tokens(loss, rollouts, reduction, None, weights).loss.backward()

        return matrix_products(step)

    assert products(torch.rand(1, N + 1)) == products(None)


@pytest.mark.parametrize("layout", ["pair", "packed"])
def test_a_verdict_is_carried_and_changes_nothing(layout):
    student, teacher = models()
    batch, verdict = batch_of(layout), torch.tensor([True, False, False, True])
    assert torch.equal(check_inputs(batch | {"verdict": verdict}).verdict, verdict)
    assert check_inputs(batch).verdict is check_inputs(batch).token_weights is None
    assert torch.equal(topd.TRD(student, teacher)(batch | {"verdict": verdict}).loss, topd.TRD(student, teacher)(batch).loss)
    topd.TOPD(student, teacher, topd.TOPDConfig(**FEW))(own_side("left") | {"verdict": verdict})
