"""Rows of which the last begins more than 2^31 entries after the first, in memory that is reserved and used by them alone."""

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 3
# Itself below 2^31, so that it is a number of 32 bits: a product of it with the row's, in 32 bits, is then cut.
STRIDE = (1 << 30) + 64
# Where such a product leads to, before the first row.
BEFORE = 1 << 31


@dataclass(frozen=True)
class FarRows:
    """Three rows, each `STRIDE` entries after the one before.

    Attributes:
        view: [3, V], all of them, as ops in C++ take them.
        rows: [V] each. Triton's interpreter copies whole storages, and each of these has no more than a row.
    """

    view: Tensor
    rows: list[Tensor]

    @property
    def first(self) -> Tensor:
        """Return the first row."""
        return self.rows[0]

    @classmethod
    def like(cls, near: Tensor) -> "FarRows":
        """Return a copy of near [3, V]."""
        rows, vocab = near.shape
        assert rows == ROWS
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        entries = (ROWS - 1) * STRIDE + vocab
        memory = mmap.mmap(-1, near.itemsize * (BEFORE + entries), flags=flags)
        begin, step = near.itemsize * BEFORE, near.itemsize * STRIDE
        whole = torch.frombuffer(memory, dtype=near.dtype, count=entries, offset=begin)
        each = [torch.frombuffer(memory, dtype=near.dtype, count=vocab, offset=begin + row * step) for row in range(ROWS)]
        far = cls(whole.as_strided((ROWS, vocab), (STRIDE, 1)), each)
        for row, values in zip(each, near, strict=True):
            row.copy_(values)
        return far

    def near(self) -> Tensor:
        """Return the rows as they are now, side by side."""
        return torch.stack(self.rows)
