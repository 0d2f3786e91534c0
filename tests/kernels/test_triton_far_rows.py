"""No kernel cuts an offset to 32 bits: rows that lie more than 2^31 entries apart give the same bits as rows side by side."""

from collections.abc import Callable

import pytest
import torch
from far_rows import ROWS, STRIDE, FarRows
from torch import Tensor

from topd_kernels.divergence_rows import launches as divergence_rows
from topd_kernels.divergence_rows.statistics import statistics
from topd_kernels.logprob_rows import launches as logprob_rows
from topd_kernels.scaled_rows import launches as scaled_rows
from topd_kernels.shared.launch import Launch, interpreted, run_all
from topd_kernels.transport import launches as transport
from topd_kernels.weighted_gather import launches as weighted_gather
from topd_kernels.weighted_scatter import launches as weighted_scatter

if not interpreted(statistics):
    pytest.skip("the kernels run on a GPU here; reserved memory is the host's", allow_module_level=True)

VOCAB = 1003
# A row's stride by which a tile is known among a launch's arguments.
STRIDES = (1031, 1033, 1039)
Made = tuple[list[Launch], list[Tensor]]


def tile(number: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows with the stride of this number."""
    return torch.randn(ROWS, STRIDES[number])[:, :vocab].to(dtype) if dtype == torch.float32 else wide(number, vocab, dtype)


def wide(number: int, vocab: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(ROWS, STRIDES[number], dtype=dtype)[:, :vocab]


def divergence(kind: str) -> Made:
    tiles = [tile(0, VOCAB), tile(1, VOCAB), tile(2, VOCAB, torch.bfloat16)]
    spec = divergence_rows.Spec(1.0, None, 1.0, None, 1.0, kind, 0.5, 0.0)
    order, out = divergence_rows.launches(*tiles[:2], None, None, torch.tensor([3, 1000, 0]), spec, tiles[2], True, splits=2)
    return order, [*tiles, out.value, out.scores]


def logprobs() -> Made:
    tiles = [tile(0, VOCAB), tile(1, VOCAB, torch.bfloat16), tile(2, VOCAB, torch.bfloat16)]
    ids = torch.tensor([[0, 1002], [5, 5], [7, 1000]])
    spec = logprob_rows.Spec(1.0, None, 1.0)
    order, out = logprob_rows.launches(tiles[0], None, ids, spec, tiles[1], tiles[2], True, splits=2)
    return order, [*tiles, out.logprobs, out.entropy, out.outside]


IDS, WEIGHTS = torch.tensor([[1, 0], [2, 2], [2, 1]]), torch.tensor([[2.0, 0.5], [-1.0, 3.0], [1.5, 1.0]])


def gather() -> Made:
    out, table = tile(0, 600), tile(1, 600)
    return weighted_gather.launches(out, table, IDS, WEIGHTS), [out, table]


def scatter() -> Made:
    out, rows = tile(0, 600), tile(1, 600)
    return weighted_scatter.launches(out, rows, IDS, WEIGHTS), [out, rows]


def scaled() -> Made:
    out, x = tile(0, 600, torch.bfloat16), tile(1, 600)
    return scaled_rows.launches(out, x, torch.tensor([2.0, -1.0, 0.5])), [out, x]


def windows() -> Made:
    tables, lengths = [tile(0, 6), tile(1, 6)], torch.tensor([3])
    ids = torch.tensor([[0, 1, 2]])
    order, out = transport.launches(tables[0], ids, lengths, tables[1], ids, lengths, "cosine", 0.05, 20, 1e-4)
    return order, [*tables, *out]


CASES: dict[str, Callable[[], Made]] = {
    "divergence_rows, one sweep": lambda: divergence("reverse_kl"),
    "divergence_rows, two sweeps": lambda: divergence("jsd"),
    "logprob_rows": logprobs,
    "weighted_gather": gather,
    "weighted_scatter": scatter,
    "scaled_rows": scaled,
    "transport": windows,
}


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_rows_far_apart_give_the_bits_of_rows_side_by_side(build):
    torch.manual_seed(0)
    order, near = build()
    run_all(order)
    torch.manual_seed(0)
    order, values = build()
    far = {value.data_ptr(): FarRows.like(value) for value in values if value.stride(0) in STRIDES}
    assert len(far) >= 2
    for launch in order:
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor) and value.data_ptr() in far:
                launch.arguments[name] = far[value.data_ptr()].first
            elif isinstance(value, int) and value in STRIDES:
                launch.arguments[name] = STRIDE
    run_all(order)
    for value, expected in zip(values, near, strict=True):
        rows = far.get(value.data_ptr())
        torch.testing.assert_close(value if rows is None else rows.near(), expected, rtol=0, atol=0, equal_nan=True)
