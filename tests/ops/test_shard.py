"""How parts of a softmax become the whole, and what a shard's name says; one process."""

import pytest
import torch
from compare import assert_near

import topd
from topd.ops.shared.row_math import distribution
from topd.ops.shared.shard import WHOLE, combined, shard_of
from topd.vocab_shard import Bounds, gap_in


@pytest.mark.parametrize("sizes", [(3, 4, 5), (0, 12, 0), (12,), (1, 11)])
@pytest.mark.parametrize("peak", [0.0, 40.0])
def test_parts_become_the_whole(sizes, peak):
    logits = torch.randn(6, 12, dtype=torch.float64)
    logits[:, 7] += peak
    parts = [distribution(part) for part in logits.split(sizes, dim=-1)]
    together = combined(torch.stack([part.top for part in parts]), torch.stack([part.rest for part in parts]))
    whole = distribution(logits)
    assert torch.equal(together.top, whole.top)
    assert_near(together.rest, whole.rest, 1e-12)
    shares = torch.stack([part.sum(-1) for part in logits.softmax(-1).split(sizes, dim=-1)])
    assert_near(together.shares[..., 0], shares, 1e-12)


def test_a_part_of_nothing_but_minus_infinity_has_no_share():
    tops, rests = torch.tensor([[-torch.inf], [1.0]]), torch.tensor([[torch.nan], [0.5]])
    together = combined(tops, rests)
    assert together.shares.tolist() == [[0.0], [1.0]]
    assert together.rest.tolist() == [0.5]


def test_the_first_rank_owns_a_tie():
    together = combined(torch.tensor([[0.0], [2.0], [2.0]]), torch.zeros(3, 1))
    assert together.owner.tolist() == [1]
    assert_near(together.rest, torch.tensor([1 + torch.tensor(-2.0).double().exp()], dtype=torch.float64), 1e-12)


def test_a_whole_vocabulary_has_no_name():
    assert WHOLE.name == ""
    assert shard_of("") is WHOLE


def test_gaps_are_told():
    assert gap_in([Bounds(0, 3), Bounds(3, 3), Bounds(3, 7)], 7) is None
    assert gap_in([Bounds(0, 3), Bounds(4, 7)], 7) == "rank 1 begins at 4 where the ranks before it end at 3"
    assert gap_in([Bounds(0, 3), Bounds(3, 6)], 7) == "the last rank ends at 6 of 7"


def test_a_shard_takes_a_process_group():
    with pytest.raises(TypeError, match=r"VocabShard.group must be a torch.distributed.ProcessGroup, got str"):
        topd.VocabShard("tp", 0, 7)
    with pytest.raises(TypeError, match=r"Head.shard must be a topd.VocabShard or None, got int"):
        topd.Head(torch.ones(2, 3), shard=4)
    with pytest.raises(ValueError, match="V, H >= 1"):
        topd.Head(torch.ones(0, 3))
