"""Run launches in Triton's interpreter, watched: every address that a kernel reads or writes is held against the tensors it was
given; bytes and floating-point operations are counted. Needs TRITON_INTERPRET=1 before the kernels are imported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
    """What a launch did: bytes read and written by the unmasked lanes, of scratch too; bytes of scratch alone; floating-point
    operations of all lanes."""

    read: int = 0
    written: int = 0
    scratch: int = 0
    flop: int = 0


def _extents(launch: Launch) -> list[tuple[str, int, int]]:
    """Return name and [begin, end) in bytes of each tensor: its own elements, not its storage."""
    extents = []
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor) and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            begin = value.data_ptr()
            extents.append((name, begin, begin + (last + 1) * value.itemsize))
    return extents


def _check(name: str, verb: str, pointers: Any, mask: Any, extents: list[tuple[str, int, int]]) -> tuple[int, int]:
    """Return the bytes of the unmasked lanes, and those among them that are in scratch."""
    size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
    used = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].astype(np.int64)
    inside, scratch = np.zeros(used.shape, dtype=bool), 0
    for tensor, begin, end in extents:
        within = (used >= begin) & (used + size <= end)
        inside |= within
        scratch += int(within.sum()) if tensor == "Scratch" else 0
    if not inside.all():
        raise OutOfBoundsError(f"{name} {verb} {int((~inside).sum())} of {used.size} addresses outside its tensors")
    return int(used.size) * size, scratch * size


@contextmanager
def _watching(launch: Launch, counts: Counts) -> Iterator[None]:
    """Count what the interpreter does."""
    extents, builder = _extents(launch), interpreter_builder
    watched = ("create_masked_load", "create_masked_store", "binary_op", "unary_op")
    load, store, binary, unary = (getattr(builder, name) for name in watched)

    def watched_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        read, scratch = _check(launch.name, "reads", pointers, mask, extents)
        counts.read += read
        counts.scratch += scratch
        return load(pointers, mask, *rest)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        written, scratch = _check(launch.name, "writes", pointers, mask, extents)
        counts.written += written
        counts.scratch += scratch
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
        for name in watched:
            delattr(builder, name)


def _run(launch: Launch) -> None:
    """Run, and raise the watch's own error, which the interpreter wraps once for each function between kernel and access."""
    try:
        launch.run()
    except InterpreterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OutOfBoundsError):
            cause = cause.__cause__
        raise error if cause is None else cause from None


def run_watched(launches: list[Launch]) -> list[Counts]:
    """Run on CPU tensors and return what each launch did; raise OutOfBoundsError where a kernel leaves its tensors."""
    runs = []
    for launch in launches:
        counts = Counts()
        with _watching(launch, counts):
            _run(launch)
        runs.append(counts)
    return runs


def total(runs: list[Counts]) -> Counts:
    """Return the counts of several launches together."""
    return Counts(*(sum(getattr(run, each.name) for run in runs) for each in fields(Counts)))
