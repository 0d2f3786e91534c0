"""topd::advise_huge_pages: ask the system for huge pages under a large buffer. It exists on the CPU, in C++ alone: it changes
speed, never a value."""

import torch
from torch import Tensor

from topd.ops.shared.op_body import define

define("topd::advise_huge_pages", "(Tensor(a!) buffer) -> ()")

# Below this the allocator reuses its own memory, whose pages are there already.
LARGE_BYTES = 4 << 20


def advise_huge_pages(buffer: Tensor) -> Tensor:
    """Return the buffer, put in huge pages where it is large."""
    if buffer.nbytes >= LARGE_BYTES:
        torch.ops.topd.advise_huge_pages(buffer)
    return buffer
