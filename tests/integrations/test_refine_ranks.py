"""RefineRollout on two ranks of which one has nothing to refine: both call a sharded teacher equally often."""

import pytest
import torch
from compare import assert_near
from two_ranks import start

for host in ("transformers", "accelerate"):
    pytest.importorskip(host)


def test_a_rank_without_refinements_keeps_step_with_the_other(tmp_path):
    from fsdp2_cases import models_of_characters
    from refine_ranks import refined

    ranks = start("integrations/refine_ranks.py", tmp_path, timeout=120)
    student, teacher = models_of_characters()
    expected = [refined(student, teacher, rank) for rank in range(2)]
    for rank, one in zip(ranks, expected, strict=True):
        for key, value in one["pairs"].items():
            assert torch.equal(rank["pairs"][key], value), key
        assert rank["counts"] == one["counts"]
        assert_near(rank["loss"], one["loss"].detach(), 1e-6)
    assert [bool(one["pairs"]["response_mask"].any()) for one in expected] == [True, False]
    assert ranks[1]["counts"] == {"empty_rollout": 1, "too_long": 1}
    (sum(one["loss"] for one in expected) / 2).backward()
    for name, parameter in student.named_parameters():
        for rank in ranks:
            assert_near(rank["gradients"][name], parameter.grad, 1e-6)
