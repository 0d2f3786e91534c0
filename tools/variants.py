"""List every launch that the Triton launchers can choose, one for each binary: `python -m tools.aot` compiles them."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from tools.binaries import source_of
from topd_kernels.divergence_rows import launches as divergence_rows
from topd_kernels.logprob_rows import launches as logprob_rows
from topd_kernels.scaled_rows import launches as scaled_rows
from topd_kernels.shared.launch import Launch
from topd_kernels.transport import launches as transport
from topd_kernels.weighted_gather import launches as weighted_gather
from topd_kernels.weighted_scatter import launches as weighted_scatter

ROWS, IDS, WIDTH = 4, 5, 576
# A vocabulary whose rows begin on 16 entries, and one whose rows do not.
ALIGNED, ODD = 64_000, 64_001
DIVERGENCES = [
    ("reverse_kl", 0.0),
    ("forward_kl", float("inf")),
    ("jsd", 0.5),
    ("forward_kl", 0.05),
    ("jsd", 0.3),
    ("skew_kl", 0.1),
    ("skew_reverse_kl", 0.1),
    ("total_variation", 0.0),
]
NARROW = (torch.bfloat16, torch.float16)


def _divergence_rows(
    dtype: torch.dtype,
    vocabs: tuple[int, int],
    divergence: tuple[str, float],
    grad: torch.dtype | None,
    *,
    scores: bool,
    general: bool,
    family: str | None,
) -> list[Launch]:
    """Return the launches of divergence_rows on a few rows."""
    student, teacher = (torch.empty(ROWS, vocab, dtype=dtype) for vocab in vocabs)
    softcap, (name, parameter) = 30.0 if general else None, divergence
    spec = divergence_rows.Spec(1.0, softcap, 1.0, softcap, 1.0, name, parameter, hard_weight=0.0)
    tile = None if grad is None else student if grad == dtype else student.new_empty(student.shape, dtype=grad)
    return divergence_rows.launches(student, teacher, None, None, None, spec, tile, scores, family=family)[0]


def _logprob_rows(
    dtype: torch.dtype, vocab: int, grad: torch.dtype | None, *, entropy: bool, general: bool, family: str | None
) -> list[Launch]:
    """Return the launches of logprob_rows on a few rows."""
    product = torch.empty(ROWS, vocab, dtype=dtype)
    spec = logprob_rows.Spec(1.0, 30.0 if general else None, 1.0)
    tile = None if grad is None else product if grad == dtype else product.new_empty(product.shape, dtype=grad)
    second = product.new_empty(product.shape, dtype=grad) if entropy and grad is not None else None
    ids = torch.zeros(ROWS, IDS, dtype=torch.int64)
    return logprob_rows.launches(product, None, ids, spec, second, tile, entropy, family=family)[0]


def _weighted(dtype: torch.dtype, table: torch.dtype, width: int, family: str | None) -> list[Launch]:
    """Return the launches of weighted_gather and weighted_scatter on a few rows."""
    ids, weights = torch.zeros(ROWS, IDS, dtype=torch.int64), torch.empty(ROWS, IDS, dtype=dtype)
    out, vocab = torch.empty(ROWS, width, dtype=dtype), torch.empty(10, width, dtype=dtype)
    gather = weighted_gather.launches(out, vocab.to(table), ids, weights, family=family)
    return [*gather, *weighted_scatter.launches(vocab, out.to(table), ids, weights, family=family)]


def _scaled(x: torch.dtype, out: torch.dtype, width: int) -> list[Launch]:
    """Return the launch of scaled_rows on a few rows."""
    numbers = torch.float64 if torch.float64 in (x, out) else torch.float32
    rows = torch.empty(ROWS, width, dtype=x)
    return scaled_rows.launches(rows.to(out), rows, torch.empty(ROWS, dtype=numbers))


def _transport(dtype: torch.dtype, cost: str, windows: tuple[int, int], width: int) -> list[Launch]:
    """Return the launch of transport on a few problems."""
    table, lengths = torch.empty(10, width, dtype=dtype), torch.ones(ROWS, dtype=torch.int64)
    ids = [torch.zeros(ROWS, window, dtype=torch.int64) for window in windows]
    return transport.launches(table, ids[0], lengths, table, ids[1], lengths, cost, 0.05, 200, 1e-4)[0]


def default_launches(family: str | None = None) -> Iterator[Launch]:
    """Yield what bfloat16 and float32 models with equal vocabularies and no softcap run on a family of devices."""
    single, equal = torch.float32, (ALIGNED, ALIGNED)
    for divergence, grad, scores in itertools.product(DIVERGENCES[:3], (torch.bfloat16, single), (False, True)):
        yield from _divergence_rows(single, equal, divergence, grad, scores=scores, general=False, family=family)
    for grad, entropy in itertools.product((torch.bfloat16, single), (False, True)):
        yield from _logprob_rows(single, ALIGNED, grad, entropy=entropy, general=False, family=family)
    yield from _weighted(single, single, WIDTH, family)
    yield from _weighted(single, torch.bfloat16, WIDTH, family)
    for x, out in ((single, single), (single, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        yield from _scaled(x, out, WIDTH)
    for dtype in (single, torch.bfloat16):
        for window in (50, 100):
            yield from _transport(dtype, "cosine", (window, window), WIDTH)


def all_launches(family: str | None = None) -> Iterator[Launch]:
    """Yield every kernel, dtype, divergence and option, over vocabularies whose rows are aligned and not."""
    yield from default_launches(family)
    for dtype in (torch.float32, torch.float64):
        grads = (None, dtype, *(NARROW if dtype == torch.float32 else ()))
        for vocab, general in itertools.product((ALIGNED, ODD), (False, True)):
            flags: dict[str, Any] = {"general": general, "family": family}
            for divergence, grad, scores in itertools.product(DIVERGENCES, grads, (False, True)):
                yield from _divergence_rows(dtype, (vocab, vocab), divergence, grad, scores=scores, **flags)
            for vocabs in ((vocab, vocab + 64), (vocab + 64, vocab)):
                yield from _divergence_rows(dtype, vocabs, DIVERGENCES[0], dtype, scores=True, **flags)
            for grad, entropy in itertools.product(grads, (False, True)):
                yield from _logprob_rows(dtype, vocab, grad, entropy=entropy, **flags)
        for table, width in itertools.product({dtype, *NARROW}, (WIDTH, WIDTH + 1)):
            yield from _weighted(dtype, table, width, family)
            yield from _scaled(dtype, table, width)
            yield from _scaled(table, dtype, width)
            yield from _scaled(table, table, width)
    dtypes = (torch.float64, torch.float32, *NARROW)
    for cost, dtype, window in itertools.product(transport.COSTS, dtypes, (10, 30, 50, 100)):
        yield from _transport(dtype, cost, (window, window), WIDTH)


def distinct(launches: Iterator[Launch]) -> list[Launch]:
    """Return one launch for each binary."""
    by_binary: dict[str, Launch] = {}
    for launch in launches:
        by_binary.setdefault(f"{source_of(launch).hash()} {launch.num_warps}", launch)
    return list(by_binary.values())
