"""topd.TOPD: windows end at either model's end tokens or the configuration's, and with the response."""

import pytest
from objective_cases import backward, batch_of, models
from topd_cases import FOURTHS, GREEDY, assert_end_at_fourths, step


@pytest.mark.parametrize("who", ["student", "teacher", "config"])
def test_whoever_says_an_end_token_ends_both_models_windows(who):
    student, teacher = models()
    options = {"config": {"eos_token_id": FOURTHS}}.get(who, {})
    if who != "config":
        {"student": student, "teacher": teacher}[who].generation_config.eos_token_id = FOURTHS
    windows = step(student, teacher, batch_of(), **GREEDY, **options).near_future.windows
    assert_end_at_fourths(windows)
    student.generation_config.eos_token_id = FOURTHS
    assert (step(student, teacher, batch_of(), eos_token_id=[]).near_future.windows.student_lengths == 6).all()


@pytest.mark.parametrize("noise", ["independent", "counterfactual"])
def test_a_rollouts_window_ends_before_a_tools_output(noise):
    student, teacher = models()
    batch = batch_of()
    batch["response_mask"][:, 10:13] = 0
    objective = step(student, teacher, batch, student_window="rollout", window_noise=noise, candidate_value=8)
    windows, stops = objective.near_future.windows, {0: 20, 1: 15, 2: 18}
    for (row, t), length in zip(windows.positions.tolist(), windows.student_lengths.tolist(), strict=True):
        assert length == min((10 if t < 10 else stops[row]) - t, 6)
    assert windows.student_lengths.min() == 1
    if noise == "counterfactual":
        assert (windows.teacher_lengths <= windows.student_lengths).all()
    assert backward(student, objective.loss).isfinite().all()
    assert objective.metrics["guidance_loss"] > 0
