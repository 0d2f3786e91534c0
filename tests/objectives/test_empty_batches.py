"""A batch without a token: the loss is 0 and so are its gradients, of every parameter, as a data-parallel step needs them."""

import pytest
import torch
from objective_cases import models
from tiny_models import bloom

import topd


def batch_of(shape):
    return {key: torch.ones(shape, dtype=torch.int64) for key in ("input_ids", "attention_mask", "response_mask")}


@pytest.mark.parametrize("shape", [(0, 20), (3, 0), (0, 0), (3, 1)], ids=str)
@pytest.mark.parametrize("student_of", [lambda: models()[0], bloom], ids=["llama", "bloom"])
@pytest.mark.parametrize(
    "config",
    [
        topd.OPDConfig(),
        topd.OPDConfig(reduction="sequence", hard_weight=0.1),
        topd.TOPDConfig(),
        topd.TOPDConfig(reduction="sequence", false_alarms="cap"),
        topd.TOPDConfig(student_window="rollout", embedding="student_hidden", candidates="top_k", candidate_value=2),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.reduction}",
)
def test_padded(config, student_of, shape):
    student, teacher = student_of(), models()[1]
    batch = batch_of(shape)
    if shape == (3, 1):
        batch["response_mask"] = torch.zeros(shape, dtype=torch.int64)
    method = topd.TOPD if isinstance(config, topd.TOPDConfig) else topd.OPD
    for num_items in (None, 7):
        student.zero_grad()
        objective = method(student, teacher, config)(batch, num_items=num_items)
        objective.loss.backward()
        assert objective.loss == objective.metrics["opd_loss"] == objective.metrics["tokens"] == 0
        assert all(p.grad is not None and (p.grad == 0).all() for p in student.parameters())
        assert objective.scores.reverse_kl.shape == objective.scores.top1_agreement.shape == shape
        if method is topd.TOPD:
            assert objective.near_future.score.shape == shape
            assert objective.near_future.windows.student_tokens.shape == (0, 50)


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_packed(reduction, bounds):
    student, teacher = models()
    batch = {
        "input_ids": torch.zeros(0, dtype=torch.int64),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "response_mask": torch.zeros(0, dtype=torch.bool),
    }
    objective = topd.OPD(student, teacher, topd.OPDConfig(reduction=reduction))(batch)
    objective.loss.backward()
    assert objective.loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in student.parameters())
    assert objective.scores.reverse_kl.shape == objective.scores.top1_agreement.shape == (0,)


@pytest.mark.parametrize("method", [topd.OPD, topd.TOPD])
def test_an_empty_batch_is_checked_like_another(method):
    batch = batch_of((0, 20))
    with pytest.raises(ValueError, match="response_mask must have shape"):
        method(*models())(batch | {"response_mask": torch.ones(0, 19, dtype=torch.bool)})


@pytest.mark.parametrize("shape", [(0, 20), (3, 0)], ids=str)
def test_windows_of_none(shape):
    student, teacher = models()
    given = [batch_of(shape)[key] for key in ("input_ids", "attention_mask")]
    windows = topd.sample_windows(student, teacher, *given, torch.zeros(0, 2, dtype=torch.int64), horizon=4)
    assert windows.student_tokens.shape == windows.teacher_tokens.shape == (0, 4)
    rollouts, hidden = topd.window_hidden(student, *given, windows)
    assert (rollouts.shape, hidden.shape) == ((*shape, 32), (0, 4, 32))
    rollouts.sum().backward()
    assert all((p.grad == 0).all() for p in student.model.parameters())
