"""Every collective of topd's ops: what processes of one torch.distributed group tell each other.

All ranks of the group must call these in the same order. Nothing here waits for a rank that raised: what may fail on one rank
alone is checked before, and its outcome exchanged by `outcomes` (`topd.ops.shared.shard`).

An all-reduced sum of exponentials loses digits, and a reduction's order of additions is the backend's own. So numbers that
decide anything are gathered, and each rank adds them in the order of the ranks: the same bits everywhere. Only gradients to
hidden states are reduced.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # some builds of torch have none
    from torch.distributed import ProcessGroup, Work


def group_of(name: str) -> "ProcessGroup":
    """Return the group whose `group_name` this is."""
    group: ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    return group


def gathered(group: "ProcessGroup", mine: Tensor) -> Tensor:
    """Return [R, ...], what each rank has, in the order of the ranks; `mine` has the same shape on all of them."""
    mine = mine.contiguous()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return torch.stack(parts)


class Gathering(NamedTuple):
    """What each rank has, on its way."""

    work: "Work"
    parts: list[Tensor]

    def arrived(self) -> Tensor:
        """Wait, and return [R, ...] in the order of the ranks."""
        self.work.wait()
        return torch.stack(self.parts)


def gathering(group: "ProcessGroup", mine: Tensor) -> Gathering:
    """Begin to gather what each rank has; `mine`, whose entries lie one after the other, has the same shape on all of them."""
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    return Gathering(dist.all_gather(parts, mine, group=group, async_op=True), parts)


def added_up(group: "ProcessGroup", mine: Tensor) -> Tensor:
    """Return the sum over the ranks, in `mine` where its entries lie one after the other; the same bits on every rank."""
    total = mine.contiguous()
    dist.all_reduce(total, group=group)
    return total


def of_first(group: "ProcessGroup", mine: Tensor) -> Tensor:
    """Return what rank 0 of the group has, a tensor of the same shape on all ranks."""
    out = mine.clone(memory_format=torch.contiguous_format)
    dist.broadcast(out, group=group, group_src=0)
    return out


def gathered_parts(group: "ProcessGroup", mine: Tensor, sizes: list[int]) -> Tensor:
    """Return [sum of sizes], what each rank has, in the order of the ranks; `mine` is [sizes[r]] on rank r."""
    if not any(sizes):
        return mine
    padded = torch.nn.functional.pad(mine, (0, max(sizes) - mine.numel()))
    return torch.cat([part[:size] for part, size in zip(gathered(group, padded), sizes, strict=True)])


def adding_up(group: "ProcessGroup", mine: Tensor) -> "Work":
    """Begin to replace `mine`, whose entries lie one after the other, by the sum over the ranks; it is there after `wait()`."""
    work: Work = dist.all_reduce(mine, group=group, async_op=True)
    return work


def adding_up_parts(group: "ProcessGroup", mine: Tensor, out: Tensor) -> "Work":
    """Begin to write to `out` [...] this rank's part of the sum over the ranks of `mine` [R, ...]; it is there after `wait()`.
    gloo adds up all parts on every rank and keeps one; NCCL sends each rank its own part alone."""
    work: Work = dist.reduce_scatter_single(out, mine.flatten(0, 1), group=group, async_op=True)
    return work


def outcomes(group: "ProcessGroup", numbers: list[int], device: torch.device) -> list[list[int]]:
    """Return the numbers of each rank, as many on all of them."""
    each: list[list[int]] = gathered(group, torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()
    return each


def exchanged_rows(group: "ProcessGroup", mine: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Return rows [sum of received, ...]: the first sent[0] rows of `mine` go to rank 0, the next sent[1] to rank 1, ..."""
    out = mine.new_empty((sum(received), *mine.shape[1:]))
    dist.all_to_all_single(out, mine.contiguous(), received, sent, group=group)
    return out
