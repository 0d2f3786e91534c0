"""topd.TOPD(false_alarms="cap"): the loss itself is capped, at the median of its response, whatever chose the candidates."""

import pytest
import torch
from objective_cases import batch_of, models
from topd_cases import step

import topd
from topd.objectives import topd as method

ALL_ARE_FALSE_ALARMS = {"candidates": "threshold", "candidate_value": -1e9, "gate": "threshold", "gate_value": 1e9}


def with_losses(monkeypatch, literal):
    """Let the loss of the j-th token of response b be literal(b, j), from j = 1 on."""
    original = method.token_losses

    def replaced(student, teacher, inputs, config):
        losses = original(student, teacher, inputs, config)
        response = inputs.rollouts.response
        number, row = response.long().cumsum(-1), torch.arange(response.shape[0]).unsqueeze(-1)
        loss = torch.where(response, literal(row, number).to(losses.loss.dtype), 0.0)
        return losses._replace(loss=loss + 0.0 * losses.loss)

    monkeypatch.setattr(method, "token_losses", replaced)


@pytest.mark.parametrize("score", ["teacher_nll", "gap"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_literal_contributions_end_at_the_median_of_their_response(monkeypatch, score, reduction):
    """Losses 1 .. 10 (lower median 5), 2 .. 22 in steps of 2 (12), and -8 .. 2 (-3: what is above it adds nothing)."""
    batch = batch_of()
    batch["response_mask"][0, 9] = 0
    slope, start = torch.tensor([[1], [2], [1]]), torch.tensor([[0], [0], [-9]])
    with_losses(monkeypatch, lambda row, number: slope * number + start)
    options = {"false_alarms": "cap", "score": score, "reduction": reduction, **ALL_ARE_FALSE_ALARMS}
    objective = step(*models(), batch, **options)
    assert batch["response_mask"].sum(-1).tolist() == [10, 11, 11]
    sums = [15 + 5 * 5, 2 * (21 + 5 * 6), -33]
    expected = sum(sums) / 32 if reduction == "token" else (sums[0] / 10 + sums[1] / 11 + sums[2] / 11) / 3
    assert objective.metrics["false_alarms"] == 32
    assert objective.metrics["opd_loss"] == pytest.approx(expected, rel=1e-6)


def test_divergent_points_and_other_tokens_stay_whole(monkeypatch):
    """Losses 1 .. 11 in each response; candidates are three tokens of each."""
    with_losses(monkeypatch, lambda row, number: number)
    batch = batch_of()
    objective = step(*models(), batch, false_alarms="cap", gate_value=0.5)
    near, number = objective.near_future, batch["response_mask"].cumsum(-1)
    kept = near.windows.positions[near.divergent]
    assert len(kept) == 5
    capped = [int(number[row, column]) for row, column in near.windows.positions[~near.divergent].tolist()]
    expected = (3 * 66 - sum(max(loss - 6, 0) for loss in capped)) / 33
    assert objective.metrics["opd_loss"] == pytest.approx(expected, rel=1e-6)
    assert max(capped) > 6


def test_the_cap_is_of_the_loss_with_its_clip_and_hard_weight():
    """A false alarm adds min(loss, median), and its gradient shrinks with it."""
    batch = batch_of()
    response = batch["response_mask"] > 0
    for own in ({"hard_weight": 0.5}, {"position_clip": 0.4}, {"divergence": "forward_kl"}):
        student, teacher = models()
        capped = step(student, teacher, batch, false_alarms="cap", **own, **ALL_ARE_FALSE_ALARMS)
        total = 0.0
        for row in range(3):
            weights = torch.zeros(response.shape)
            losses = []
            for column in response[row].nonzero()[:, 0].tolist():
                alone = weights.index_put((torch.tensor(row), torch.tensor(column)), torch.tensor(1.0))
                one = topd.OPD(student, teacher, topd.OPDConfig(**own))(batch | {"token_weights": alone}, num_items=1)
                losses.append(one.loss.item())
            median = sorted(losses)[(len(losses) - 1) // 2]
            total += sum(min(loss, median) for loss in losses)
        assert capped.metrics["opd_loss"] == pytest.approx(total / response.sum().item(), rel=1e-5)
