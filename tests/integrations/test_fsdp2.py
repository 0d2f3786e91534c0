"""FSDP2 on two ranks: wherever the head is, the gradients are the mean over the ranks of those of one process."""

import pytest
import torch
from compare import assert_near
from two_ranks import start

import topd
from topd.integrations.rollouts import sample_rollouts

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("integrations/fsdp2_ranks.py", tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.mark.parametrize("upstream", ["even", "uneven"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_the_gradients_are_one_processs_mean(ranks, bf16, upstream):
    from fsdp2_cases import PLACES, in_one_process

    expected = in_one_process(bf16, upstream)
    for rank in ranks:
        for place in PLACES:
            for name, gradient in rank["places"][place, bf16, upstream].items():
                assert_near(gradient, expected[name], 1e-6)


def test_the_teacher_may_be_sharded_too(ranks):
    from fsdp2_cases import PLACES, in_one_process
    from fsdp2_ranks import opd

    expected = in_one_process(loss=opd)
    for rank in ranks:
        for place in PLACES:
            for name, gradient in rank["teachers"][place].items():
                assert_near(gradient, expected[name], 1e-6)


def means_of_small(loss):
    """The mean over two ranks of a small model's gradients, in one process."""
    from fsdp2_cases import small, small_batches

    student, teacher = small()
    for states in small_batches():
        loss(student, teacher, states).backward()
    return {name: parameter.grad / 2 for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("together", [False, True], ids=["own unit", "norm and head"])
def test_the_heads_own_method_gathers_it(ranks, together):
    from fsdp2_cases import small_loss

    def loss(student, teacher, states):
        parts = zip(student(states).split(3), states.split(3), strict=True)
        return sum(small_loss(hidden, student, other, teacher) for hidden, other in parts)

    expected = means_of_small(loss)
    for rank in ranks:
        for name, gradient in rank["method"][together].items():
            assert_near(gradient, expected[name], 1e-6)


def test_full_tensor_needs_grad_placements(ranks):
    """Without them each rank keeps the rows that it holds of its own gradient: a wrong gradient and no error."""

    def loss(student, teacher, states):
        head = topd.Head(student.head.weight)
        return topd.linear_divergence(student(states), head, states, topd.Head(teacher)).sum()

    expected = means_of_small(loss)["head.weight"]
    for rank in ranks:
        assert_near(rank["full_tensor(avg)"], expected, 1e-6)
        assert (rank["full_tensor()"] - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("method", ["windows", "rollout", "states", "no guidance"])
def test_ranks_with_unequally_many_windows_stay_in_step(ranks, method):
    from fsdp2_cases import in_one_process
    from fsdp2_ranks import LOSSES

    expected = in_one_process(loss=LOSSES[method])
    for rank in ranks:
        for place in ("root", "norm and head"):
            for name, gradient in rank["windows"][place, method].items():
                assert_near(gradient, expected[name], 2e-6)


def test_the_windows_of_that_test_are_unequal():
    from fsdp2_cases import micro_batches, models
    from fsdp2_ranks import WINDOWS

    student, teacher = models()
    config = topd.TOPDConfig(candidates="threshold", candidate_value=4.0, **WINDOWS)
    results = [topd.TOPD(student, teacher, config)(batch) for batch in micro_batches()]
    counts = [int(result.metrics["divergent_points"]) for result in results]
    assert counts[0] != counts[2]
    assert counts[1] != counts[3]
    assert 0 in counts


def test_rollouts_that_end_early_on_one_rank(ranks):
    from fsdp2_cases import models
    from fsdp2_ranks import ENDS, part_of
    from trainer_cases import prompts

    student, teacher = models()
    lengths = []
    for number, rank in enumerate(ranks):
        options = {"max_new_tokens": 9, "temperature": 0.0, "eos_token_id": ENDS}
        expected = sample_rollouts(student, **part_of(prompts(), number), **options)
        for key, value in rank["sampled"]["rollouts"].items():
            assert torch.equal(value, expected[key])
        assert_near(rank["sampled"]["loss"], topd.OPD(student, teacher)(expected).loss.detach(), 1e-6)
        lengths.append(expected["input_ids"].shape[1])
    assert lengths[0] != lengths[1]
