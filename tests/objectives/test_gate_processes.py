"""TOPD(process_group=): one process with eight rollouts, two with four and eight with one decide alike, and train alike."""

import pytest
import torch
from compare import assert_near
from gate_cases import CASES, GREEDY, OF_EIGHT, eight_rollouts, step_of
from objective_cases import models
from two_ranks import start

import topd
from topd.objectives.gating import Gate


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("objectives/gated_ranks.py", tmp_path_factory.mktemp("ranks"), timeout=120, ranks=8)


def assert_like_one_process(parts, options, calls=1):
    whole = eight_rollouts()
    one = step_of(options, whole, whole, calls=calls)
    assert 0 < one["divergent"].sum() < one["divergent"].numel()
    assert torch.equal(torch.cat([part["divergent"] for part in parts]), one["divergent"])
    assert_near(torch.cat([part["distance"] for part in parts]), one["distance"], 1e-12)
    assert_near(sum(part["loss"] for part in parts), one["loss"], 1e-12, "loss")
    assert_near(sum(part["gradient"] for part in parts), one["gradient"], 1e-10, "gradient")
    assert sum(part["guidance"] for part in parts).item() == pytest.approx(one["guidance"].item(), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, ranks):
    parts = [rank["two"]["even", case] for rank in ranks[:2]]
    assert_like_one_process(parts, CASES[case], calls=2 if case == "running" else 1)


@pytest.mark.parametrize("split", ["uneven", "empty"])
def test_parts_of_any_size(split, ranks):
    assert_like_one_process([rank["two"][split, "lowest"] for rank in ranks[:2]], CASES["lowest"])


@pytest.mark.parametrize("case", OF_EIGHT)
def test_eight_processes_are_one(case, ranks):
    """Two of them have no candidate."""
    parts = [rank["eight"][case] for rank in ranks]
    assert [part["divergent"].numel() for part in parts].count(0) == 2
    assert_like_one_process(parts, CASES[case])


def test_beside_tensor_parallelism_the_group_is_the_data_parallel_one(ranks):
    """Of four ranks, of which two at a time share the models' layers."""
    for first in (0, 1):
        assert_like_one_process([rank["four"] for rank in ranks[first:4:2]], CASES["lowest"])


def test_without_num_items_the_mean_over_the_processes_is_the_step(ranks):
    """What DDP takes; both halves have as many tokens."""
    whole = eight_rollouts()
    one = step_of(GREEDY, whole, whole)
    mean = sum(rank["two"]["own items"]["gradient"] for rank in ranks[:2]) / 2
    assert_near(mean, one["gradient"], 1e-10, "gradient")


def test_without_a_group_each_judges_its_own(ranks):
    """What the tests above would miss if it did not matter."""
    whole = eight_rollouts()
    one = step_of(GREEDY, whole, whole)
    assert not torch.equal(torch.cat([rank["two"]["alone"]["divergent"] for rank in ranks[:2]]), one["divergent"])


def test_one_process_alone_is_its_own_group():
    gate = Gate("lowest_fraction_out", None)
    assert gate(torch.rand(10)).items is None
    objective = topd.TOPD(*models())
    assert objective.process_group is None
    for wrong in ("dp", 1):
        with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup that holds this"):
            topd.TOPD(*models(), process_group=wrong)
        with pytest.raises(TypeError, match="process_group must be"):
            objective.process_group = wrong
