"""Rows of an embedding table that several processes share."""

from typing import Any

import torch
from torch import Tensor

from topd.models.output_layer import local
from topd.ops.shared.collectives import added_up
from topd.vocab_shard import VocabShard, shard_of_dtensor


@torch.no_grad()
def looked_up(table: Any, shared: VocabShard | None, *tokens: Tensor) -> list[Tensor]:
    """Return the rows [m, K, d] of a DTensor [V, d] for each of some ids [m, K]; ids outside of it get any row.

    Where the table is split along the vocabulary over the processes that share the head, which have the same ids, each adds the
    rows that it holds: exact, since a row is held once. Any other table is put together.

    Args:
        shared: the head's; None: the processes have other ids.
    """
    ids = [each.clamp(0, table.shape[0] - 1) for each in tokens]
    split = [each for each in table.placements if not each.is_replicate()]
    shard = shard_of_dtensor("embedding", table) if shared and len(split) == 1 and split[0].is_shard(0) else None
    if shard is None or shared is None or shard.group != shared.group:
        whole = table.full_tensor()
        return [whole[each] for each in ids]
    return [_summed(local(table), each - shard.start, shard) for each in ids]


def _summed(rows: Tensor, columns: Tensor, shard: VocabShard) -> Tensor:
    """Return the rows of ids, counted from this process's first token, added up over the processes."""
    own = rows.new_zeros(*columns.shape, rows.shape[1])
    if not columns.numel():
        return own
    here = (columns >= 0) & (columns < rows.shape[0])
    own[here] = rows[columns[here]]
    return added_up(shard.group, own)
