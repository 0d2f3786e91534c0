"""A step of a method: flop and bytes by hand."""

import pytest
import torch

from topd.costs.call import LossCall
from topd.costs.devices import Device
from topd.costs.shapes import ModelShape
from topd.costs.sharded import rank_share
from topd.costs.steps import Step, step_report

# A flop and a byte a second: seconds are flop (over 0.7) or bytes.
SLOW = Device("slow", "sm_90", processors=1, lanes=1, clock=1.0, matrix_flop=1 / 0.7, bandwidth=1.0, memory_bytes=80e9)
STUDENT = ModelShape("student", 64, 1000, True, 94_000, 2, 30_000, 128)
TEACHER = ModelShape("teacher", 128, 1000, True, 248_000, 4, 120_000, 256)


def step_of(method="opd", device=SLOW, student=STUDENT, n=2000, **options):
    call = LossCall(student, TEACHER, n, torch.bfloat16, "reverse_kl", True, device)
    given = {"length": 100, "teacher_tokens": None, "checkpointing": False} | options
    return Step(method, call, **given)


def report_of(step):
    report = step_report(step, step.call.plan())
    return report, {stage["name"]: stage for stage in report["stages"]}


def test_passes_multiply_each_number_once_a_token():
    report, stages = report_of(step_of())
    assert stages["teacher's forward"]["flop"] == stages["teacher's forward"]["seconds"] == 2 * 120_000 * 2000
    assert stages["student's forward"]["flop"] == 2 * 30_000 * 2000
    assert stages["student's backward"]["flop"] == 4 * 30_000 * 2000
    assert stages["divergence, with its backward"]["flop"] == 2 * 2000 * 1000 * (3 * 64 + 128)
    assert stages["student's backward"]["memory_bytes"] == 2 * 94_000
    assert stages["AdamW"]["memory_bytes"] == 8 * 94_000
    assert stages["AdamW"]["seconds"] == 94_000 * (3 * 2 + 2 * 8)
    assert report["seconds"] == sum(stage["seconds"] for stage in report["stages"])
    assert report["held_bytes"]["weights"] == 2 * (94_000 + 248_000)


def test_checkpointing_runs_the_forward_again_and_keeps_layers_inputs():
    _, stages = report_of(step_of(checkpointing=True))
    assert stages["student's backward (activations again)"]["flop"] == 6 * 30_000 * 2000
    assert stages["student's forward"]["memory_bytes"] == 2 * 2000 * 64 * 2


def test_few_tokens_are_bound_by_reading_weights():
    _, stages = report_of(step_of(n=1))
    assert stages["teacher's forward"]["bound"] == "products"  # 2 flop against 2 bytes a number
    fast = SLOW._replace(matrix_flop=100 / 0.7)
    _, stages = report_of(step_of(n=1, device=fast))
    assert (stages["teacher's forward"]["bound"], stages["teacher's forward"]["seconds"]) == ("reading weights", 2 * 120_000)


def test_windows_are_a_forward_of_all_branches_for_each_token():
    """45 candidates, 50 tokens; 13 false alarms."""
    fast = SLOW._replace(matrix_flop=1e6)
    report, stages = report_of(step_of("topd", fast))
    numbers = 30_000 + 64 * 1000
    windows = stages["student's windows"]
    assert (report["candidates"], report["horizon"]) == (45, 50)
    assert windows["flop"] == 2 * numbers * 45 * 50
    caches = 50 * 2 * 45 * (100 + 50) // 2 * 128
    assert windows["seconds"] == 50 * 2 * numbers + caches
    assert windows["bound"] == "reading caches"
    assert windows["memory_bytes"] == 2 * 45 * 50 * 128
    assert stages["student's forward over windows"]["flop"] == 2 * 30_000 * 32 * 50
    assert stages["guidance, with its backward"]["flop"] == 2 * 3 * 32 * 50 * 64 * 1000
    assert report_of(step_of("topd", fast, n=100))[1]["student's windows"]["bound"] == "reading weights"


def test_trds_teacher_reads_the_attempt_too():
    assert report_of(step_of("trd"))[0]["teacher_tokens"] == 4000
    assert report_of(step_of("trd", teacher_tokens=2500))[1]["teacher's forward"]["flop"] == 2 * 120_000 * 2500


def test_what_a_config_does_not_tell_is_said():
    unknown = STUDENT._replace(
        parameters=None, layers=None, body=None, cached=None, unknown="a mixture of experts (num_experts)"
    )
    report, stages = report_of(step_of("topd", student=unknown))
    assert report["seconds"] is report["held_bytes"] is None
    assert stages["student's forward"]["note"] == "student: a mixture of experts (num_experts)"
    assert stages["teacher's forward"]["seconds"] > 0


def test_no_time_is_said_of_a_cpu():
    report, stages = report_of(step_of("topd", None))
    assert report["seconds"] is None
    assert all(stage["seconds"] is None for stage in stages.values())
    assert stages["student's forward"]["flop"] == 2 * 30_000 * 2000


@pytest.mark.parametrize("ranks", [1, 8])
def test_a_rank_has_its_share_of_the_vocabulary(ranks):
    call = step_of(n=4096).call
    rank = rank_share(call, ranks)
    assert rank["vocab"] == 1000 // ranks
    assert rank["flop"] == 2 * 4096 * (1000 // ranks) * (3 * 64 + 128)
    assert rank["student_weight_bytes"] == 2 * 64 * (1000 // ranks)
    assert rank["grad_weight_bytes"] == 4 * 64 * (1000 // ranks)
    assert rank["grad_hidden_bytes"] == 4 * 64 * 4096
    assert rank["statistics_bytes_a_row"] == 40 * (ranks - 1)
    assert rank["grad_hidden_bytes_a_row"] == 2 * (ranks - 1) * 4 * 64 // ranks


def test_shares_that_are_not_equal_count_the_largest():
    assert rank_share(step_of().call, 3)["vocab"] == 334
