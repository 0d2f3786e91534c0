"""`topd.profile` around a loop: what it reports, and that the objective and torch are afterwards as they were."""

import json

import pair_cases
import pytest
import torch
from objective_cases import batch_of, models
from tiny_models import VOCAB

import topd
from topd.objectives.observers import NOBODY
from topd.profiling import block
from topd.profiling.timeline import HostClock

FORWARD = {"teacher_forward", "student_forward", "divergence"}
BACKWARD = {"backward_divergence", "backward_student"}
WINDOWS = {"student_windows", "teacher_windows", "transport", "window_forward", "guidance"}
OF_WINDOWS = {"backward_guidance", "backward_windows"}
FEW = {"candidates": "top_k", "candidate_value": 3, "horizon": 6}


def train(objective, batch, steps=2):
    for _ in range(steps):
        objective(batch).loss.backward()


@pytest.fixture
def opd():
    return topd.OPD(*models())


def test_every_stage_of_opd_is_timed_and_they_add_up(opd):
    batch = batch_of()
    with topd.profile(opd) as profile:
        train(opd, batch)
        profile_in_block = str(profile)
    report = profile.report
    assert "no report before its block has ended" in profile_in_block
    assert {stage.stage for stage in report.stages} == FORWARD | BACKWARD | {"objective", "rest"}
    assert all(stage.seconds > 0 and stage.entered == 2 for stage in report.stages)
    assert sum(stage.seconds for stage in report.stages) == pytest.approx(report.seconds, rel=0.02, abs=2e-3)
    assert (report.calls, report.backwards) == (2, 2)
    tokens = 2 * int(batch["response_mask"].sum())
    assert report.tokens == tokens
    assert report.logits_bytes == 4 * tokens * 2 * VOCAB == 2 * report.largest_logits_bytes
    of_the_loss = [stage.seconds for stage in report.stages if "divergence" in stage.stage]
    assert report.loss_share == pytest.approx(sum(of_the_loss) / report.timed)


def test_topd_parts_the_backward_of_windows_and_guidance():
    objective = topd.TOPD(*models(), topd.TOPDConfig(**FEW))
    with topd.profile(objective) as profile:
        train(objective, batch_of())
    stages = [stage.stage for stage in profile.report.stages]
    assert set(stages) == FORWARD | BACKWARD | WINDOWS | OF_WINDOWS | {"objective", "rest"}
    backward = ["backward_guidance", "backward_windows", "backward_divergence", "backward_student"]
    assert [stage for stage in stages if stage.startswith("backward")] == backward


def test_a_stage_takes_the_time_that_it_takes(opd, monkeypatch):
    """A clock that an operation turns: the teacher's forward lasts 5 s, the student's backward 3 s, all else nothing."""
    clock = HostClock()
    moment = [0.0]
    monkeypatch.setattr(clock, "now", lambda: moment[0])
    monkeypatch.setattr(block, "clock_of", lambda device: clock)

    def turn(seconds):
        moment[0] += seconds

    opd.teacher.model.register_forward_hook(lambda *_: turn(5.0))
    opd.student.get_input_embeddings().weight.register_hook(lambda _: turn(3.0))
    with topd.profile(opd) as profile:
        train(opd, batch_of(), steps=1)
        turn(2.0)
    seconds = {stage.stage: stage.seconds for stage in profile.report.stages}
    assert {name: value for name, value in seconds.items() if value} == {
        "teacher_forward": 5.0,
        "backward_student": 3.0,
        "rest": 2.0,
    }


def test_the_loss_and_its_gradients_are_those_without_a_profile(opd):
    batch = batch_of()
    train(opd, batch, steps=1)
    plain = [parameter.grad.clone() for parameter in opd.student.parameters()]
    opd.student.zero_grad()
    with topd.profile(opd):
        train(opd, batch, steps=1)
    assert all(map(torch.equal, plain, (parameter.grad for parameter in opd.student.parameters())))


@pytest.mark.parametrize("inside", [False, True])
def test_an_error_leaves_the_objective_unobserved(opd, inside):
    """An error of the loop, or one inside the objective that the loop catches."""
    profile = topd.profile(opd)

    def fail():
        with profile:
            if inside:
                with pytest.raises(ValueError, match="input_ids"):
                    opd({})
            train(opd, batch_of(), steps=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert opd.observer is NOBODY
    assert profile.report.calls == 1
    assert {stage.stage for stage in profile.report.stages} == FORWARD | BACKWARD | {"objective", "rest"}
    train(opd, batch_of(), steps=1)
    assert profile.report.calls == 1


def test_a_backward_pass_after_the_block_is_nobodys(opd):
    with topd.profile(opd) as profile:
        loss = opd(batch_of()).loss
    loss.backward()
    assert (profile.report.calls, profile.report.backwards) == (1, 0)


def test_nested_and_repeated_use_is_refused(opd):
    profile = topd.profile(opd)
    with profile, pytest.raises(ValueError, match="must not be observed twice"), topd.profile(opd):
        pass
    with pytest.raises(ValueError, match="must not be entered twice"), profile:
        pass
    with topd.profile(opd) as again:
        train(opd, batch_of(), steps=1)
    assert again.report.calls == 1


def test_a_block_without_a_step_says_so(opd, tmp_path):
    with topd.profile(opd) as profile:
        pass
    assert "no call of the objective inside the block" in str(profile)
    profile.to_json(tmp_path / "empty.json")
    assert json.loads((tmp_path / "empty.json").read_text())["calls"] == 0
    with pytest.raises(ValueError, match="this one never did"):
        profile.plot(tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


def test_a_part_of_the_loop_gets_a_name(opd):
    with topd.profile(opd) as profile:
        with profile.stage("rollouts"):
            batch = batch_of()
        with profile.stage("whole step"):
            train(opd, batch, steps=1)
    stages = {stage.stage: stage for stage in profile.report.stages}
    assert stages["rollouts"].seconds > 0
    assert FORWARD | BACKWARD | {"whole step"} <= set(stages)
    for wrong, error in ((3, TypeError), (" ", ValueError), ("late", ValueError)):
        with pytest.raises(error), profile.stage(wrong):
            pass


def test_json_plot_trace_and_text(opd, tmp_path):
    pytest.importorskip("matplotlib")
    with topd.profile(opd, trace=tmp_path / "trace.json") as profile:
        train(opd, batch_of())
    profile.to_json(tmp_path / "profile.json")
    profile.plot(tmp_path / "profile.png")
    contents = json.loads((tmp_path / "profile.json").read_text())
    assert contents["loss_share"] == profile.report.loss_share
    assert [stage["stage"] for stage in contents["stages"]] == [stage.stage for stage in profile.report.stages]
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names
    text = str(profile)
    for line in (
        "profile of OPD on cpu",
        "teacher's forward",
        "loss  ",
        "peak memory",
        "none: on a CPU",
        "float32 logits",
        "trace",
    ):
        assert line in text


def test_wrong_arguments_are_refused(opd, tmp_path):
    with pytest.raises(TypeError, match=r"of a trainer pass trainer\.objective"):
        topd.profile(opd.student)
    with pytest.raises(TypeError, match="trace must be None or a path"):
        topd.profile(opd, trace=3)
    with pytest.raises(ValueError, match="folder that exists"):
        topd.profile(opd, trace=tmp_path / "absent" / "trace.json")
    with torch.profiler.profile(), pytest.raises(ValueError, match="cannot run twice"):
        topd.profile(opd, trace=tmp_path / "trace.json")
    profile = topd.profile(opd)
    for method in (profile.to_json, profile.plot):
        with pytest.raises(ValueError, match="has not ended"):
            method(tmp_path / "early")


def test_every_method_is_observed():
    student, teacher = models()
    batch = pair_cases.batch_of()
    for objective in (topd.TRD(student, teacher), topd.OPSD(student)):
        with topd.profile(objective) as profile:
            train(objective, batch, steps=1)
        assert {stage.stage for stage in profile.report.stages} >= FORWARD | BACKWARD
        assert profile.report.objective == type(objective).__name__


def test_a_teacher_known_by_its_top_k_has_no_forward_and_no_logits():
    from topk_teacher_cases import with_topk

    student, teacher = models()
    objective, batch = topd.OPD(student, None, topd.OPDConfig("forward_kl")), with_topk(batch_of(), teacher)
    with topd.profile(objective) as profile:
        train(objective, batch, steps=1)
    assert {stage.stage for stage in profile.report.stages} == {"student_forward", "divergence", "objective", "rest"} | BACKWARD
    assert profile.report.logits_bytes == 4 * profile.report.tokens * VOCAB


def test_a_student_that_is_not_trained_has_no_backward(opd):
    opd.student.requires_grad_(False)
    with topd.profile(opd) as profile:
        opd(batch_of())
    assert (profile.report.calls, profile.report.backwards) == (1, 0)
    assert {stage.stage for stage in profile.report.stages} == FORWARD | {"objective", "rest"}


def test_times_and_memory_are_those_of_the_device(device, tmp_path):
    student, teacher = (model.to(device) for model in models())
    objective = topd.OPD(student, teacher)
    batch = {name: value.to(device) for name, value in batch_of().items()}
    train(objective, batch, steps=1)
    with topd.profile(objective, trace=tmp_path / "trace.json") as profile:
        train(objective, batch)
    report = profile.report
    assert report.timed == pytest.approx(report.seconds, rel=0.3)
    assert report.peak_mib >= 0
    on_gpu = device.type == "cuda"
    assert (report.host_waits is not None) == on_gpu
    assert all((stage.peak_mib is not None) == on_gpu for stage in report.stages)
