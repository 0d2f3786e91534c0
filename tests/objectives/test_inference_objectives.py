"""Objectives, windows and rollouts with what torch.inference_mode() made: a teacher loaded under it, batches, windows."""

import pytest
import torch
from objective_cases import backward, batch_of, models
from tiny_models import tiny

import topd
from topd.integrations.rollouts import pack_rollouts, sample_rollouts

MILD = {"initializer_range": 0.2}
FEW = {"candidates": "top_k", "candidate_value": 2, "horizon": 4}
CONFIGS = [
    topd.OPDConfig(),
    topd.OPDConfig(reduction="sequence", hard_weight=0.2),
    topd.TOPDConfig(**FEW),
    topd.TOPDConfig(student_window="rollout", embedding="student_hidden", false_alarms="mask", **FEW),
]


def loaded_teacher():
    with torch.inference_mode():
        teacher = tiny("qwen3", seed=3, **MILD)
    assert next(teacher.parameters()).is_inference()
    return teacher


def step(student, teacher, config, batch, **options):
    method = topd.TOPD if isinstance(config, topd.TOPDConfig) else topd.OPD
    objective = method(student, teacher, config)(batch, generator=torch.Generator().manual_seed(0), **options)
    return objective.loss.detach(), backward(student, objective.loss)


def of_inference_mode(batch):
    with torch.inference_mode():
        return {key: value.clone() for key, value in batch.items()}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)], ids=["whole", "one"])
def test_teacher_and_batch_of_inference_mode_change_nothing(config, rows):
    student, teacher = models()
    batch = {key: value[rows] for key, value in batch_of().items()}
    items = torch.tensor(7.0)
    expected = step(student, teacher, config, batch, num_items=items)
    with torch.inference_mode():
        items = items.clone()
    result = step(student, loaded_teacher(), config, of_inference_mode(batch), num_items=items)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


def test_rollouts_sampled_under_inference_mode_train():
    student, teacher = models()
    prompts = torch.randint(61, (1, 5))
    with torch.inference_mode():
        batch = sample_rollouts(student, prompts, torch.ones_like(prompts), max_new_tokens=6)
        packed = pack_rollouts(batch)
    assert batch["input_ids"].is_inference()
    loss, gradient = step(student, loaded_teacher(), topd.OPDConfig(), batch)
    ordinary = {key: value.clone() for key, value in batch.items()}
    expected = step(student, teacher, topd.OPDConfig(), ordinary)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    packed_loss, packed_gradient = step(student, loaded_teacher(), topd.OPDConfig(), packed)
    torch.testing.assert_close(packed_loss, loss)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_windows_sampled_under_inference_mode_are_differentiated():
    student, teacher = models()
    batch = batch_of()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = torch.tensor([[0, 12], [1, 8]])
    gradients = []
    for constants in (lambda: torch.inference_mode(False), torch.inference_mode):
        with constants():
            given = ids.clone(), mask.clone()
            windows = topd.sample_windows(student, teacher, *given, positions.clone(), horizon=3, temperature=0)
        hidden = topd.window_hidden(student, *given, windows)
        gradients.append(backward(student, sum(each.square().sum() for each in hidden)))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("method", [topd.OPD, topd.TOPD])
def test_a_student_loaded_under_inference_mode_is_refused_by_name(method):
    objective = method(loaded_teacher(), models()[1])
    with pytest.raises(ValueError, match=r"student must be loaded outside torch.inference_mode.* model.embed_tokens.weight"):
        objective(batch_of())
    packed = pack_rollouts(batch_of())
    with pytest.raises(ValueError, match=r"student must be loaded outside torch.inference_mode"):
        topd.OPD(loaded_teacher(), models()[1])(packed)
    windows = topd.Windows(torch.tensor([[0, 12]]), *[torch.ones(1, 2, dtype=torch.int64)] * 2, *[torch.tensor([2])] * 2)
    batch = batch_of()
    with pytest.raises(ValueError, match=r"student_model must be loaded outside torch.inference_mode"):
        topd.window_hidden(loaded_teacher(), batch["input_ids"], batch["attention_mask"], windows)
    with torch.no_grad():
        assert topd.OPD(loaded_teacher(), models()[0])(batch).loss > 0
