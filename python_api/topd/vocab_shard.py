"""Which rows of a vocabulary a head holds where several processes share it."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from topd.checks.values import LARGEST_INT, flag, positive_int
from topd.models.fsdp2_state import INSIDE, is_sharded_by_fsdp

if TYPE_CHECKING:  # some builds of torch have none
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class VocabShard:
    """The part of a vocabulary that this process holds: its head's rows are those of the tokens from `start` on.

    All ranks of the group hold the vocabulary together, in the order of their ranks, without a gap. Rows at `vocab` and beyond
    are padding and do not count. A rank may hold none.

    Args:
        group: torch.distributed.ProcessGroup; of a device mesh, `mesh.get_group("tp")`.
        start: the first token that is held here, >= 0.
        vocab: the entries of the whole vocabulary, without padding.
        sequence_parallel: False: hidden states are those of all rows, the same on every rank. True: hidden states, mask,
            tokens, hint and results are those of this rank's rows, equally many on all ranks; the rows of all ranks, in the
            order of the ranks, are the whole sequence.

    Raises:
        TypeError, ValueError: a wrong type or range.
    """

    group: "ProcessGroup"
    start: int
    vocab: int
    _: KW_ONLY
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if not (torch.distributed.is_available() and isinstance(self.group, torch.distributed.ProcessGroup)):
            raise TypeError(
                f"VocabShard.group must be a torch.distributed.ProcessGroup, got {type(self.group).__name__}; "
                "torch.distributed.group.WORLD is that of all processes, mesh.get_group(...) that of a mesh's dimension"
            )
        if isinstance(self.start, bool) or not isinstance(self.start, int):
            raise TypeError(f"VocabShard.start must be an int, got {type(self.start).__name__}")
        if not 0 <= self.start <= LARGEST_INT:
            raise ValueError(f"VocabShard.start must be >= 0, the first token that is held here, got {self.start}")
        positive_int("VocabShard.vocab", self.vocab)
        flag("VocabShard.sequence_parallel", self.sequence_parallel)

    def held(self, rows: int) -> int:
        """Return how many of a head's rows are tokens: all but padding."""
        return min(max(self.vocab - self.start, 0), rows)


class Bounds(NamedTuple):
    """The tokens that a rank holds, from start to stop, both within the vocabulary."""

    start: int
    stop: int

    def within(self, vocab: int) -> "Bounds":
        """Return those of them that lie in a smaller vocabulary."""
        return Bounds(min(self.start, vocab), min(self.stop, vocab))

    def shared(self, other: "Bounds") -> int:
        """Return how many tokens both hold."""
        return max(0, min(self.stop, other.stop) - max(self.start, other.start))


def gap_in(bounds: list[Bounds], vocab: int) -> str | None:
    """Return what keeps the ranks' tokens from being the vocabulary in the order of the ranks; None where nothing does."""
    reached = 0
    for rank, (start, stop) in enumerate(bounds):
        if start != reached:
            return f"rank {rank} begins at {start} where the ranks before it end at {reached}"
        reached = stop
    return None if reached == vocab else f"the last rank ends at {reached} of {vocab}"


def is_dtensor(value: Any) -> bool:
    """Tell whether a tensor is a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "placements") and hasattr(value, "device_mesh")


def shard_of_dtensor(name: str, weight: Any) -> VocabShard:
    """Return which rows of a DTensor [V, H] this process holds.

    Raises:
        ValueError: its placements are others than one Shard(0) and else Replicate; FSDP2 shards it.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = weight.device_mesh, weight.placements
    if is_sharded_by_fsdp(weight):
        raise ValueError(
            f"{name} must not be sharded by FSDP2 while the loss runs, since its processes have different rows, got a DTensor "
            f"with {tuple(placements)}; {INSIDE}"
        )
    split = [index for index, placement in enumerate(placements) if type(placement) is Shard and placement.dim == 0]
    others = [placement for index, placement in enumerate(placements) if index not in split]
    if len(split) != 1 or not all(isinstance(placement, Replicate) for placement in others):
        raise ValueError(
            f"{name} must be a plain tensor, or a DTensor with exactly one Shard(0) and Replicate on every other dimension of "
            f"its mesh, got {tuple(placements)}; redistribute it first, or pass {name}.full_tensor()"
        )
    (dimension,) = split
    vocab, rows = weight.shape[0], -(-weight.shape[0] // mesh.size(dimension))  # as torch.chunk cuts
    start = min(rows * mesh.get_local_rank(dimension), vocab)
    return VocabShard(mesh.get_group(dimension), start, vocab)


def local_of(name: str, value: Any, weight: Any, *, split: bool = True) -> Any:
    """Return this process's part of a tensor that belongs to a DTensor weight; one that is local already is returned itself.

    Args:
        name: the argument, for the message.
        value: a tensor or None.
        weight: the head's weight, as it came.
        split: it is cut as the weight is; else it is replicated.
    """
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Replicate

    placements = tuple(weight.placements) if is_dtensor(weight) else ()
    expected = placements if split else (Replicate(),) * len(placements)
    if not placements or tuple(value.placements) != expected or value.device_mesh != weight.device_mesh:
        rule = f"{expected} on the mesh of Head.weight" if placements else "a plain tensor, as Head.weight is"
        raise ValueError(f"{name} must be {rule}, got a DTensor with {tuple(value.placements)}; redistribute it first")
    return value.to_local()
