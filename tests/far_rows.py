"""Rows that lie more than 2^31 entries apart, in memory that is reserved and never used but for them."""

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

STRIDE = (1 << 31) + 64


@dataclass(frozen=True)
class FarRows:
    """Two rows, `STRIDE` entries apart.

    Attributes:
        view: [2, V], both of them, as ops in C++ take them.
        first: [V], the first alone: Triton's interpreter copies whole storages, and this one has no more than a row.
        second: [V].
    """

    view: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def like(cls, near: Tensor) -> "FarRows":
        """Return a copy of near [2, V]."""
        rows, vocab = near.shape
        assert rows == 2
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        memory = mmap.mmap(-1, near.itemsize * (STRIDE + vocab), flags=flags)
        both = torch.frombuffer(memory, dtype=near.dtype, count=STRIDE + vocab).as_strided((2, vocab), (STRIDE, 1))
        first = torch.frombuffer(memory, dtype=near.dtype, count=vocab)
        second = torch.frombuffer(memory, dtype=near.dtype, count=vocab, offset=near.itemsize * STRIDE)
        far = cls(both, first, second)
        first.copy_(near[0])
        second.copy_(near[1])
        return far

    def near(self) -> Tensor:
        """Return the rows as they are now, side by side."""
        return torch.stack([self.first, self.second])
