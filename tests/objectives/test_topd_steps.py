"""topd.TOPD: what must leave it equal to OPD, and a step's metrics, ways and costs."""

import math

import pytest
import torch
from objective_cases import MILD, backward, batch_of, models
from tiny_models import bloom, flat_gradient, generated, prefix, tiny
from topd_cases import FEW, GREEDY, step

import topd


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_without_guidance_and_with_keep_it_equals_opd(reduction):
    student, teacher = models()
    batch = batch_of()
    objective = step(student, teacher, batch, guidance_weight=0, reduction=reduction)
    expected = topd.OPD(student, teacher, topd.OPDConfig(reduction=reduction))(batch)
    assert objective.loss.item() == expected.loss.item()
    assert torch.equal(backward(student, objective.loss), backward(student, expected.loss))
    assert objective.metrics["divergent_points"] > 0
    assert objective.metrics["guidance_loss"] > 0


@pytest.mark.parametrize("options", [{"gate": "threshold", "gate_value": 1e9}, {"gate_value": 1.0}], ids=str)
def test_with_no_divergent_point_and_keep_it_equals_opd(options):
    student, teacher = models()
    batch = batch_of()
    objective, expected = step(student, teacher, batch, **options), topd.OPD(student, teacher)(batch)
    assert objective.loss.item() == expected.loss.item()
    assert torch.equal(backward(student, objective.loss), backward(student, expected.loss))
    assert (objective.metrics["divergent_points"], objective.metrics["guidance_loss"]) == (0, 0)
    assert {name for name, value in objective.metrics.items() if not value.isfinite()} == {"distance_divergent"}
    assert objective.metrics["distance_divergent"].isnan()


def test_with_no_false_alarm_there_is_no_distance_of_one():
    objective = step(*models(), batch_of(), gate="threshold", gate_value=-1.0)
    assert objective.metrics["false_alarms"] == 0
    assert objective.metrics["distance_divergent"] > 0
    assert objective.metrics["distance_false_alarm"].isnan()


def test_with_no_candidate_it_equals_opd():
    student, teacher = models()
    batch = batch_of()
    objective = step(student, teacher, batch, candidates="threshold", candidate_value=1e9)
    assert objective.loss.item() == topd.OPD(student, teacher)(batch).loss.item()
    assert objective.near_future.windows.student_tokens.shape == (0, 6)
    unmeasured = {name for name, value in objective.metrics.items() if not value.isfinite()}
    assert unmeasured == {"distance_divergent", "distance_false_alarm"}


def test_an_empty_response_trains_on():
    student, teacher = models()
    objective = step(student, teacher, batch_of(empty=[1]))
    assert objective.metrics["candidates"] == 6
    assert 1 not in objective.near_future.windows.positions[:, 0]
    assert math.isfinite(objective.loss.item())
    assert backward(student, objective.loss).isfinite().all()


def test_num_items_weighs_a_part_by_its_share():
    student, teacher = models()
    batch = batch_of()
    count = int(batch["response_mask"].sum())
    whole = step(student, teacher, batch)
    generator = torch.Generator().manual_seed(5)
    part = topd.TOPD(student, teacher, topd.TOPDConfig(**FEW))(batch, num_items=4 * count, generator=generator)
    assert part.loss.item() == pytest.approx(whole.loss.item() / 4, rel=1e-6)
    metrics = part.metrics
    assert metrics["loss"].item() == pytest.approx((metrics["opd_loss"] + 0.1 * metrics["guidance_loss"]).item(), rel=1e-6)


def test_the_same_generator_gives_the_same_step():
    student, teacher = models()
    first, again = step(student, teacher, batch_of()), step(student, teacher, batch_of())
    assert first.loss.item() == again.loss.item()
    assert torch.equal(first.near_future.windows.teacher_tokens, again.near_future.windows.teacher_tokens)


def test_every_metric_is_there_and_a_float():
    student, teacher = models()
    metrics = step(student, teacher, batch_of()).metrics
    stages = "student_forward teacher_forward divergence student_windows teacher_windows transport window_forward guidance"
    losses = "loss opd_loss guidance_loss tokens sequence_reduction second_forward"
    points = "candidates divergent_points false_alarms low_divergence_share distance_divergent distance_false_alarm"
    others = "student_entropy teacher_entropy student_lost_mass teacher_lost_mass marginal_error window_length"
    diagnostics = "kl_mean kl_p50 kl_p95 kl_p99 kl_max student_perplexity teacher_perplexity perplexity_gap"
    named = f"{losses} {points} {others} {diagnostics} student_branches teacher_branches".split()
    assert set(metrics) == {*named, *(f"seconds_{stage}" for stage in stages.split())}
    assert all(value.dtype == torch.float32 and value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert metrics["window_length"] == 6


def test_models_that_cannot_branch_take_the_longer_way_and_say_so():
    student, teacher = bloom(), tiny("gemma3_sliding", **MILD)
    with pytest.warns(UserWarning, match="the student's windows come from generate.*its forward takes no position_ids"):
        objective = step(student, teacher, batch_of())
    assert (objective.metrics["student_branches"], objective.metrics["teacher_branches"]) == (0, 1)
    assert objective.near_future.windows.student_way.startswith("generate: ")
    assert backward(student, objective.loss).abs().max() > 0


def test_nothing_is_computed_twice(monkeypatch):
    """One forward with gradient of the student over the rollouts, one of the teacher, one linear_divergence; windows grow from
    their caches, one token of each branch a step; then one forward of the student over the windows' tokens."""
    student, teacher = models()
    batch, shapes, calls = batch_of(), {"student": [], "teacher": []}, []
    for name, model in (("student", student), ("teacher", teacher)):
        model.model.register_forward_hook(
            lambda _, __, kwargs, ___, name=name: shapes[name].append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
    from topd.objectives import token_losses as comparison

    original = comparison.linear_divergence
    monkeypatch.setattr(comparison, "linear_divergence", lambda *a, **k: calls.append(1) or original(*a, **k))
    objective = step(student, teacher, batch)
    steps = [(9, 1)] * 5
    assert shapes["teacher"] == [(3, 20), *steps]
    assert shapes["student"][:-1] == [(3, 20), *steps]
    rows = objective.near_future.windows.positions[objective.near_future.divergent][:, 0]
    assert shapes["student"][-1] == (rows.unique().numel(), int(rows.bincount().max()) * 5)
    assert len(calls) == 1


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_steps_run(autocast):
    """Near the float32 loss, with a gradient for every parameter."""
    student, teacher = models()
    exact = step(student, teacher, batch_of(), **GREEDY).metrics["opd_loss"].item()
    if not autocast:
        student, teacher = student.to(torch.bfloat16), teacher.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        objective = step(student, teacher, batch_of(), **GREEDY)
    objective.loss.backward()
    assert objective.metrics["opd_loss"].item() == pytest.approx(exact, rel=0.1)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in student.parameters())


def test_a_lora_student_of_its_own_base_trains_the_adapter_alone():
    peft = pytest.importorskip("peft")
    base, teacher = models()
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj", "lm_head"], "init_lora_weights": False}
    student = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    objective = step(student, teacher, batch_of(), **GREEDY)
    objective.loss.backward()
    trained = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in student.named_parameters() if "lora_" in name}
    ids = prefix(batch_of()["input_ids"], batch_of()["attention_mask"], objective.near_future.windows.positions[0])
    assert objective.near_future.windows.student_tokens[0].tolist() == generated(student, ids, 6, None)


def test_the_teacher_is_a_constant():
    student, teacher = models()
    step(student, teacher, batch_of()).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert flat_gradient(student).abs().max() > 0
