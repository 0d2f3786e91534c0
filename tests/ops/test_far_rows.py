"""The C++ kernels cut no offset to 32 bits: rows that lie more than 2^31 entries apart give the bits of rows side by side."""

from collections.abc import Callable

import pytest
import torch
from far_rows import ROWS, FarRows
from torch import Tensor

from topd.ops.linear_divergence.spec import RowSpec
from topd.ops.linear_logprobs.spec import LogprobSpec

pytestmark = pytest.mark.cpp

VOCAB = 1003
IDS, WEIGHTS = torch.tensor([[1, 0], [2, 2], [2, 1]]), torch.tensor([[2.0, 0.5], [-1.0, 3.0], [1.5, 1.0]])


def divergence(student: Tensor, teacher: Tensor) -> list[Tensor]:
    spec = RowSpec(1.0, None, 1.0, None, 1.0, "jsd", 0.5, 0.0)
    return torch.ops.topd.divergence_rows(student, teacher, None, None, torch.tensor([3, 1000, 0]), *spec, True, True)


def logprobs(product: Tensor, entropy_tile: Tensor) -> list[Tensor]:
    return torch.ops.topd.logprob_rows(product, None, IDS, *LogprobSpec(1.0, None, 1.0), entropy_tile, True, True)


def gather(table: Tensor, _: Tensor) -> list[Tensor]:
    out = torch.zeros(ROWS, VOCAB)
    torch.ops.topd.weighted_gather(out, table, IDS, WEIGHTS)
    return [out]


def scatter(rows: Tensor, _: Tensor) -> list[Tensor]:
    out = torch.zeros(ROWS, VOCAB)
    torch.ops.topd.weighted_scatter(out, rows, IDS, WEIGHTS)
    return [out]


CALLS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "divergence_rows": divergence,
    "logprob_rows": logprobs,
    "weighted_gather": gather,
    "weighted_scatter": scatter,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_rows_far_apart_give_the_bits_of_rows_side_by_side(call):
    near = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB)
    far = [FarRows.like(tile) for tile in near]
    expected, results = call(*near), call(*(rows.view for rows in far))
    for result, wanted in zip([*results, *(rows.near() for rows in far)], [*expected, *near], strict=True):
        assert torch.equal(result, wanted)
