"""FSDP2 on two ranks: wherever the head is, the gradients are the mean over the ranks of those of one process."""

import pytest
from compare import assert_near
from two_ranks import start

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
