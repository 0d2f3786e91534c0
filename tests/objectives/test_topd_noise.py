"""topd.TOPD with window_noise: a step runs and trains, equal models have no distance, a batch in parts has the same windows."""

import copy
import math

import pytest
import torch
from objective_cases import backward, batch_of, models
from topd_cases import step

NOISES = [{"window_noise": "shared"}, {"window_noise": "counterfactual", "student_window": "rollout"}]
each_noise = pytest.mark.parametrize("options", NOISES, ids=lambda options: options["window_noise"])
EXACT = {"cost": "mismatch", "solver": "exact"}


@each_noise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_trains(options, dtype):
    student, teacher = (model.to(dtype) for model in models())
    objective = step(student, teacher, batch_of(), **options)
    assert math.isfinite(objective.loss.item())
    assert objective.metrics["divergent_points"] > 0
    assert objective.metrics["guidance_loss"] > 0
    gradient = backward(student, objective.loss)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    independent = step(student, teacher, batch_of(), **options | {"window_noise": "independent"})
    assert not torch.equal(objective.near_future.windows.teacher_tokens, independent.near_future.windows.teacher_tokens)


@each_noise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_have_no_distance(options, dtype):
    student = models()[0].to(dtype)
    near_future = step(student, copy.deepcopy(student), batch_of(), **options, **EXACT).near_future
    assert near_future.windows.positions.shape[0] > 3
    assert near_future.transport.distance.eq(0).all()
    independent = step(student, student, batch_of(), **options | {"window_noise": "independent"}, **EXACT)
    assert independent.near_future.transport.distance.gt(0).any()


@each_noise
def test_a_batch_in_parts_has_the_same_windows(options):
    student, teacher = models()
    options = options | {"gate": "threshold", "gate_value": 0.5}  # parts have three candidates
    whole, batch = step(student, teacher, batch_of(), **options).near_future.windows, batch_of()
    parts = [step(student, teacher, {name: value[rows] for name, value in batch.items()}, **options) for rows in ([0], [1, 2])]
    assert torch.equal(torch.cat([part.near_future.windows.teacher_tokens for part in parts]), whole.teacher_tokens)
    assert torch.equal(torch.cat([part.near_future.windows.student_tokens for part in parts]), whole.student_tokens)


@each_noise
def test_an_empty_batch_and_no_candidate_cost_nothing(options):
    student, teacher = models()
    for batch, own in ((batch_of([0, 1, 2]), {}), (batch_of(), {"candidates": "threshold", "candidate_value": 1e9})):
        objective = step(student, teacher, batch, **options, **own)
        assert objective.near_future.windows.teacher_tokens.shape == (0, 6)
        assert backward(student, objective.loss).isfinite().all()


@each_noise
def test_checkpointed_layers_draw_the_same_windows(options):
    """Gradient checkpointing forbids the first pass' cache: the student's windows come from a second one."""
    student, teacher = models()
    plain = step(student, teacher, batch_of(), **options).near_future.windows
    student.train()
    student.gradient_checkpointing_enable()
    objective = step(student, teacher, batch_of(), **options)
    assert objective.metrics["second_forward"] == 1
    assert torch.equal(objective.near_future.windows.student_tokens, plain.student_tokens)
    assert torch.equal(objective.near_future.windows.teacher_tokens, plain.teacher_tokens)
