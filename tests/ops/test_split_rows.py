"""How chunks take the rows that ranks share; one process, which plays each rank."""

import pytest
import torch

from topd.ops.shared.plan import plan_chunks
from topd.ops.shared.shard import Shard
from topd.ops.shared.split_rows import SplitRows


class Ranks:
    """What of a process group is asked here."""

    def __init__(self, rank: int, size: int) -> None:
        self.number, self.members = rank, size

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.members


# Unmasked rows of each rank, of ten.
COUNTS = [(10, 10, 10), (7, 0, 2), (0, 0, 5), (1, 10, 4), (0, 0, 0)]


def chosen_of(counts):
    return torch.cat([10 * rank + torch.randperm(10)[:count].sort().values for rank, count in enumerate(counts)])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_chunks_take_the_same_share_of_every_rank(counts, rows):
    chosen = chosen_of(counts)
    plan = plan_chunks(chosen.numel(), 5, workspace_bytes=20 * rows)
    ranks = [SplitRows(Shard(Ranks(rank, 3), sequence=True), chosen, 10) for rank in range(3)]
    assert torch.equal(ranks[0].rows.sort().values, chosen)
    for start, stop in plan.bounds():
        pieces = [split.piece(start, stop) for split in ranks]
        share = (stop - start) / chosen.numel()
        for rank, piece in enumerate(pieces):
            assert torch.equal(ranks[rank].rows, ranks[0].rows)
            assert piece.rank.numel() == stop - start
            assert abs(piece.mine.numel() - share * counts[rank]) < 2
        assert pieces[0].most == max(piece.mine.numel() for piece in pieces)


@pytest.mark.parametrize("counts", COUNTS[:-1])
def test_what_is_put_by_rank_comes_back_in_order(counts):
    chosen = chosen_of(counts)
    whole = torch.randn(30, 3)
    splits = [SplitRows(Shard(Ranks(rank, 3), sequence=True), chosen, 10) for rank in range(3)]
    for start, stop in [(0, 2), (2, chosen.numel()), (0, chosen.numel())]:
        part = whole[splits[0].rows[start:stop]]
        for rank, split in enumerate(splits):
            piece = split.piece(start, stop)
            by_rank = piece.by_rank(part)
            assert torch.equal(by_rank[rank, : piece.mine.numel()], whole[10 * rank : 10 * rank + 10][piece.mine])
            assert torch.equal(by_rank[piece.rank, piece.slot], part)
