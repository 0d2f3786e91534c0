"""What is made of linear_logprobs on sharded heads against the truth on whole heads, and what topd.plan says of them."""

import pytest
from compare import Outcome, assert_outcome
from shard_cases import whole
from sharded_compositions import STARTS
from two_ranks import start


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("losses/sharded_compositions.py", tmp_path_factory.mktemp("ranks"), timeout=120)


def assert_true(parts):
    """Check what the ranks have together against the truth that each of them holds."""
    together = whole(parts, STARTS, 41)
    assert_outcome(together, Outcome(**parts[0]["truth"]), 1e-11)


@pytest.mark.parametrize("name", ["soft_targets", "guidance", "entropy_aware"])
def test_losses_that_are_made_of_it(name, ranks):
    assert_true([rank[name] for rank in ranks])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("support", ["raw", "renormalised", "tail"])
def test_topk_divergence(direction, support, ranks):
    assert_true([rank["topk_divergence"][f"{direction} {support}"] for rank in ranks])


def test_a_plan_is_of_the_tokens_of_its_rank(ranks):
    first, second = (rank["planned"] for rank in ranks)
    assert (first["vocab"], second["vocab"]) == (23, 18)
    assert first["seen"] == [first["plan"]]
    assert second["seen"] == [first["plan"]]
    for part in (first, second):
        assert part["backend"] == "eager"
        assert 'backend "eager"' in part["text"]
        split, nothing, whole_student = part["wrong"]
        assert "student.shard must have sequence_parallel=False to be planned" in split
        assert "student must hold a token on this rank to be planned" in nothing
        assert "got a shard of teacher alone" in whole_student
