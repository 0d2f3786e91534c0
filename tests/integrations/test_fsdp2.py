"""FSDP2 on two ranks: wherever the head is, the gradients are the mean over the ranks of those of one process."""

import pytest
from compare import assert_near
from two_ranks import start

import topd

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
