"""How much a job may allocate, and what an error says of a peer."""

import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from topd.memory import GIB, allocated_bytes, free_bytes
from topd_bench.timing import Contender

SHARE = 0.8  # of the free memory
MEMORY_WORDS = ("can't allocate memory", "out of memory", "not enough memory", "bad_alloc")


def limit_memory(limit_gib: float | None) -> float | None:
    """Let this process allocate so much and no more: what asks for more fails, instead of the machine. Return the limit in GiB,
    None where the system has none (only Linux counts data)."""
    free = free_bytes(torch.device("cpu"))
    limit = limit_gib if limit_gib is not None else None if free is None else SHARE * free / GIB
    if limit is None:
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = allocated_bytes() + int(limit * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    return limit


def is_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in MEMORY_WORDS)


def words_of(error: Exception, limit_gib: float | None) -> str:
    """Return what a row says of an error."""
    if is_memory(error):
        return f"out of memory: it may have {limit_gib:.1f} GiB" if limit_gib is not None else "out of memory"
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"


class Call(NamedTuple):
    """A first call: its result and seconds, or the words for why there is none."""

    result: Any
    seconds: float
    why: str = ""


def first_call(run: Callable[[], Any], limit_gib: float | None) -> Call:
    """Call once; an error is an answer."""
    began = time.perf_counter()
    try:
        result = run()
    except Exception as error:
        why = words_of(error, limit_gib)
    else:
        return Call(result, time.perf_counter() - began)
    return Call(None, time.perf_counter() - began, why)


class Guarded:
    """A contender that, once it has failed, does nothing more, so that the others' rounds go on.

    Attributes:
        why: what it failed of; empty so far.
    """

    def __init__(self, run: Contender, limit_gib: float | None) -> None:
        self.run, self.limit_gib, self.why = run, limit_gib, ""

    def __call__(self) -> object:
        if self.why:
            return None
        call = first_call(self.run, self.limit_gib)
        self.why = call.why
        return call.result
