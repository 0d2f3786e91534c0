"""Triton's interpreter, watched: every address that a kernel reads or writes is held against the tensors it was given; bytes
and floating-point operations are counted. Needs TRITON_INTERPRET=1 before the kernels are imported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import interpreter_builder

from topd_kernels.shared.launch import Launch

# Operations that move or compare numbers count nothing.
_COUNTED = {np.add, np.subtract, np.multiply, np.divide, np.exp, np.log, np.sqrt, np.abs, np.negative}


class OutOfBoundsError(Exception):
    """A kernel touched memory that belongs to none of its tensors."""


@dataclass
class Counts:
    """Of a run: bytes read and written by the unmasked lanes, and floating-point operations of all lanes."""

    read: int = 0
    written: int = 0
    flop: int = 0
    kernels: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # the same three, by kernel


def _extents(launch: Launch) -> list[tuple[int, int]]:
    """[begin, end) in bytes of each tensor: its own elements, not its storage."""
    found = []
    for value in launch.arguments.values():
        if isinstance(value, torch.Tensor) and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            begin = value.data_ptr()
            found.append((begin, begin + (last + 1) * value.itemsize))
    return found


def _check(name: str, verb: str, addresses: Any, mask: Any, size: int, extents: list[tuple[int, int]]) -> int:
    """The bytes of the unmasked lanes."""
    used = np.broadcast_to(addresses, mask.shape)[mask.astype(bool)].astype(np.int64)
    inside = np.zeros(used.shape, dtype=bool)
    for begin, end in extents:
        inside |= (used >= begin) & (used + size <= end)
    if not inside.all():
        raise OutOfBoundsError(f"{name} {verb} {int((~inside).sum())} of {used.size} addresses outside its tensors")
    return int(used.size) * size


@contextmanager
def _watching(launch: Launch, counts: Counts) -> Iterator[None]:
    extents, builder = _extents(launch), interpreter_builder
    load, store, binary, unary = (
        getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "binary_op", "unary_op")
    )

    def watched_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        counts.read += _check(launch.name, "reads", pointers.data, mask.data, size, extents)
        return load(pointers, mask, *rest)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        counts.written += _check(launch.name, "writes", pointers.data, mask.data, size, extents)
        return store(pointers, value, mask, *rest)

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            out = run(*arguments)
            if arguments[-1] in _COUNTED and out.data.dtype.kind == "f":
                counts.flop += out.data.size
            return out

        return wrapper

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.binary_op, builder.unary_op = counted(binary), counted(unary)
    try:
        yield
    finally:
        for name in ("create_masked_load", "create_masked_store", "binary_op", "unary_op"):
            delattr(builder, name)


def _run(launch: Launch) -> None:
    """The interpreter wraps an error once for each function between the kernel and the access."""
    try:
        launch.run()
    except InterpreterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OutOfBoundsError):
            cause = cause.__cause__
        raise error if cause is None else cause from None


def run_watched(launches: list[Launch]) -> Counts:
    """Run on CPU tensors; raises OutOfBoundsError where a kernel leaves its tensors."""
    counts = Counts()
    for launch in launches:
        before = counts.read, counts.written, counts.flop
        with _watching(launch, counts):
            _run(launch)
        read, written, flop = counts.kernels.get(launch.name, (0, 0, 0))
        counts.kernels[launch.name] = (
            read + counts.read - before[0],
            written + counts.written - before[1],
            flop + counts.flop - before[2],
        )
    return counts
