"""What each backend does in its own way: an `Engine` for each of "eager", "cpp" and "triton".

An op turns the name of its backend into an engine once, where it unpacks its arguments (`topd.ops.shared.fields`); everything
below takes the engine and asks it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topd.backends import multiplies_bf16, triton_launcher
from topd.ops.shared.advise_huge_pages import advise_huge_pages
from topd.ops.shared.plan import GPU_BLOCK
from topd.products import refused_products

Kernel = Callable[..., Any]
# On a GPU a tile's row takes a multiple of so many entries, whatever the vocabulary: then each row begins where wide loads and
# stores want it, and matrix products stay off their slow kernels.
ALIGNED_ENTRIES = 16
_EAGER_KERNELS: dict[str, Kernel] = {}


def row_width(vocab: int, entries: int) -> int:
    """Return the least multiple of `entries` that holds a row of `vocab` entries."""
    return -(-vocab // entries) * entries


def eager_kernel(op: str) -> Callable[[Kernel], Kernel]:
    """Register a function as what the backend "eager" runs for topd::<op>: it takes the op's arguments and returns its
    results."""

    def register(kernel: Kernel) -> Kernel:
        _EAGER_KERNELS[op] = kernel
        return kernel

    return register


class Engine:
    """How one backend computes.

    Attributes:
        name: the backend's.
        keeps_few_rows: the kernels leave the gradient to a product in the product's own tile, in the tile's dtype, so that
            calls of few rows may keep that tile for the backward pass (`topd.ops.shared.few_rows`).
        row_entries: a tile's row takes a multiple of so many entries.
        scales_rows: it has a kernel for topd::scaled_rows; elsewhere that is a few operations of torch.
    """

    name: str
    keeps_few_rows = False
    row_entries = 1
    scales_rows = False

    def kernel(self, op: str, device: torch.device) -> Kernel:
        """Return what runs topd::<op> on tensors of this device."""
        kernel: Kernel = getattr(torch.ops.topd, op)
        return kernel

    def buffer(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on the device of `like`."""
        return torch.empty(shape, dtype=dtype, device=like.device)

    def row_width(self, vocab: int) -> int:
        """Return the entries that a tile's row of `vocab` entries takes in memory."""
        return row_width(vocab, self.row_entries)

    def tile(self, rows: int, vocab: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tile [rows, vocab], whose rows may stand further apart."""
        return self.buffer((rows, self.row_width(vocab)), like, dtype)[:, :vocab]

    def temporaries(self, eager: int) -> int:
        """Return how many tiles a chunk needs beside its own, of which eager torch needs `eager`."""
        return 0

    def like_a_gpu(self, device: torch.device) -> bool:
        """Tell whether this device is a GPU, or plays one, as the CPU does for Triton's interpreter."""
        return device.type == "cuda"

    def row_block(self, device: torch.device) -> int:
        """Return the rows of which a chunk holds a multiple, where so many fit."""
        return GPU_BLOCK if self.like_a_gpu(device) else 1

    def multiplies(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether matrix products of this dtype, of 16 bits, can be taken with float32 out."""
        return device.type == "cuda" and refused_products(device, dtype) is None

    def product_dtype(self, dtype: torch.dtype, tile: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype in which the matrix products of a side take its weight of `dtype`: its own 16 bits where these can
        be multiplied with float32 out, else the tile's."""
        own = tile == torch.float32 and dtype.itemsize == 2 and self.multiplies(dtype, device)
        return dtype if own else tile

    def grad_dtype(self, dtype: torch.dtype, tile: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype of dlogits: that of the products, whose 16 bits have a tile of their own; else the tile's."""
        return self.product_dtype(dtype, tile, device)


class Eager(Engine):
    """Torch in chunks, on any device."""

    name = "eager"

    def kernel(self, op: str, device: torch.device) -> Kernel:
        return _EAGER_KERNELS[op]

    def temporaries(self, eager: int) -> int:
        return eager


class Cpp(Engine):
    """The C++ kernels, on the CPU."""

    name = "cpp"
    keeps_few_rows = True

    def buffer(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        return advise_huge_pages(torch.empty(shape, dtype=dtype, device=like.device))

    def multiplies(self, dtype: torch.dtype, device: torch.device) -> bool:
        return dtype == torch.bfloat16 and multiplies_bf16()

    def grad_dtype(self, dtype: torch.dtype, tile: torch.dtype, device: torch.device) -> torch.dtype:
        return tile


class Triton(Engine):
    """The Triton kernels, on GPUs; on CPU tensors in Triton's interpreter, past the dispatcher, which knows the C++ kernels
    there."""

    name = "triton"
    row_entries = ALIGNED_ENTRIES
    scales_rows = True

    def kernel(self, op: str, device: torch.device) -> Kernel:
        return triton_launcher(op) if device.type == "cpu" else super().kernel(op, device)

    def like_a_gpu(self, device: torch.device) -> bool:
        return True

    def multiplies(self, dtype: torch.dtype, device: torch.device) -> bool:
        return device.type == "cpu" or super().multiplies(dtype, device)


EAGER, CPP, TRITON = Eager(), Cpp(), Triton()
_ENGINES: dict[str, Engine] = {engine.name: engine for engine in (EAGER, CPP, TRITON)}


def engine_of(backend: str) -> Engine:
    """Return the engine of a backend's name."""
    return _ENGINES[backend]
