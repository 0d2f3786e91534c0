"""Every collective of topd's ops: what processes of one torch.distributed group tell each other.

All ranks of the group must call these in the same order. Nothing here waits for a rank that raised: what may fail on one rank
alone is checked before, and its outcome exchanged by `outcomes` (`topd.ops.shared.shard`).

An all-reduced sum of exponentials loses digits, and a reduction's order of additions is the backend's own. So numbers that
decide anything are gathered, and each rank adds them in the order of the ranks: the same bits everywhere. Only gradients to
hidden states are reduced.

Where a process dies, gloo's collectives raise on its neighbours at once. They name the ranks whose connections are lost.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # some builds of torch have none
    from torch.distributed import ProcessGroup, Work

LOST_TAG = 1 << 20  # of messages that nobody receives; the group is not used again


def group_of(name: str) -> "ProcessGroup":
    """Return the group whose `group_name` this is."""
    group: ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    return group


def gathered(group: "ProcessGroup", mine: Tensor) -> Tensor:
    """Return [R, ...], what each rank has, in the order of the ranks; `mine` has the same shape on all of them."""
    mine = mine.contiguous()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    with naming_lost_ranks(group):
        dist.all_gather(parts, mine, group=group)
    return torch.stack(parts)


class Sending(NamedTuple):
    """A collective on its way."""

    group: "ProcessGroup"
    work: "Work"

    def wait(self) -> None:
        """Wait until it is done."""
        with naming_lost_ranks(self.group):
            self.work.wait()


class Gathering(NamedTuple):
    """What each rank has, on its way."""

    sending: Sending
    parts: list[Tensor]

    def arrived(self) -> Tensor:
        """Wait, and return [R, ...] in the order of the ranks."""
        self.sending.wait()
        return torch.stack(self.parts)


def gathering(group: "ProcessGroup", mine: Tensor) -> Gathering:
    """Begin to gather what each rank has; `mine`, whose entries lie one after the other, has the same shape on all of them."""
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    with naming_lost_ranks(group):
        return Gathering(Sending(group, dist.all_gather(parts, mine, group=group, async_op=True)), parts)


def added_up(group: "ProcessGroup", mine: Tensor) -> Tensor:
    """Return the sum over the ranks, in `mine` where its entries lie one after the other; the same bits on every rank."""
    total = mine.contiguous()
    with naming_lost_ranks(group):
        dist.all_reduce(total, group=group)
    return total


def of_first(group: "ProcessGroup", mine: Tensor) -> Tensor:
    """Return what rank 0 of the group has, a tensor of the same shape on all ranks."""
    out = mine.clone(memory_format=torch.contiguous_format)
    with naming_lost_ranks(group):
        dist.broadcast(out, group=group, group_src=0)
    return out


def gathered_parts(group: "ProcessGroup", mine: Tensor, sizes: list[int]) -> Tensor:
    """Return [sum of sizes], what each rank has, in the order of the ranks; `mine` is [sizes[r]] on rank r."""
    if not any(sizes):
        return mine
    padded = torch.nn.functional.pad(mine, (0, max(sizes) - mine.numel()))
    return torch.cat([part[:size] for part, size in zip(gathered(group, padded), sizes, strict=True)])


def adding_up(group: "ProcessGroup", mine: Tensor) -> Sending:
    """Begin to replace `mine`, whose entries lie one after the other, by the sum over the ranks; it is there after `wait()`."""
    with naming_lost_ranks(group):
        return Sending(group, dist.all_reduce(mine, group=group, async_op=True))


def adding_up_parts(group: "ProcessGroup", mine: Tensor, out: Tensor) -> Sending:
    """Begin to write to `out` [...] this rank's part of the sum over the ranks of `mine` [R, ...]; it is there after `wait()`.
    gloo adds up all parts on every rank and keeps one; NCCL sends each rank its own part alone."""
    with naming_lost_ranks(group):
        return Sending(group, dist.reduce_scatter_single(out, mine.flatten(0, 1), group=group, async_op=True))


def outcomes(group: "ProcessGroup", numbers: list[int], device: torch.device) -> list[list[int]]:
    """Return the numbers of each rank, as many on all of them."""
    each: list[list[int]] = gathered(group, torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()
    return each


def exchanged_rows(group: "ProcessGroup", mine: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Return rows [sum of received, ...]: the first sent[0] rows of `mine` go to rank 0, the next sent[1] to rank 1, ..."""
    out = mine.new_empty((sum(received), *mine.shape[1:]))
    with naming_lost_ranks(group):
        dist.all_to_all_single(out, mine.contiguous(), received, sent, group=group)
    return out


@contextmanager
def naming_lost_ranks(group: "ProcessGroup") -> Iterator[None]:
    """Raise the error of a collective with the names of the ranks whose connections are lost, where there are some."""
    try:
        yield
    except RuntimeError as error:
        if not (lost := _lost_ranks(group)):
            raise
        names = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
        raise RuntimeError(
            f"rank {dist.get_rank()} lost the connection to {names}: the process died, or left the group of a sharded head; "
            "its own output says why. Start all ranks again"
        ) from error


def _lost_ranks(group: "ProcessGroup") -> list[int]:
    """Return the ranks, as the whole job counts them, to which nothing can be sent; empty where the backend is not gloo."""
    if "gloo" not in dist.get_backend(group):
        return []
    lost = []
    for peer in range(group.size()):
        if peer != group.rank():
            try:
                dist.isend(torch.zeros(1), group=group, group_dst=peer, tag=LOST_TAG)
            except RuntimeError:
                lost.append(dist.get_global_rank(group, peer))
    return lost
