"""Large buffers of the ops. topd::advise_huge_pages exists on the CPU, in C++ alone: it changes speed, never a value."""

import torch
from torch import Tensor

torch.library.define("topd::advise_huge_pages", "(Tensor(a!) buffer) -> ()")

# Below this the allocator reuses its own memory, whose pages are there already.
LARGE_BYTES = 4 << 20


def buffer(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """An uninitialised tensor on the device of `like`, in huge pages where the compiled CPU backend can ask for them."""
    out = torch.empty(shape, dtype=dtype, device=like.device)
    if backend == "cpp" and out.nbytes >= LARGE_BYTES:
        torch.ops.topd.advise_huge_pages(out)
    return out
