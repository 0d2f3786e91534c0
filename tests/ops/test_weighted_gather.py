"""weighted_gather, out[n] += sum_m weights[n, m] table[ids[n, m]], against a dense matrix of weights."""

import pytest
import torch
from torch import Tensor
from weighted_cases import DTYPES, dense, random_ids

from topd.ops.shared.engines import CPP
from topd.ops.weighted_gather.op import PIECE, weighted_gather


def random_case(n: int, m: int, vocab: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Table, ids with repeats, of which some lie outside, and weights."""
    ids = random_ids(n, m, vocab)
    return torch.randn(vocab, width).to(dtype), ids, torch.randn(n, m)


@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (7, 3, 5, 1), (9, 50, 11, 33), (40, 1, 300, 64), (5, 4, 6, 1025)], ids=str)
def test_is_the_dense_product(sizes, dtype, sums, engine):
    """Added to what is there, in out's dtype, whatever the table's."""
    table, ids, weights = random_case(*sizes, dtype)
    out, weights = torch.randn(sizes[0], sizes[3], dtype=sums), weights.to(sums)
    expected = out.double() + dense(ids, weights, sizes[2]) @ table.double()
    assert weighted_gather(engine, out, table, ids, weights) is None
    assert out.dtype == sums
    tolerance = 1e-13 if sums == torch.float64 else 3e-6
    assert ((out - expected).abs() <= tolerance * (1 + expected.abs().max())).all()


@pytest.mark.parametrize("m", [1, 3])
def test_a_weight_of_zero_and_an_id_outside_add_nothing_whatever_the_table_holds(m, engine):
    table = torch.randn(6, 8)
    table[[0, 4, 5]] = torch.nan
    ids = torch.tensor([[1, 4, -1], [0, 2, 6], [5, 10_000, 3]])[:, :m]
    weights = torch.tensor([[2.0, 0.0, torch.nan], [0.0, -1.0, torch.inf], [-0.0, 7.0, 0.5]])[:, :m]
    out = torch.ones(3, 8)
    weighted_gather(engine, out, table, ids, weights)
    expected = [1 + 2 * table[1], 1 - table[2] if m == 3 else torch.ones(8), 1 + 0.5 * table[3] if m == 3 else torch.ones(8)]
    torch.testing.assert_close(out, torch.stack(expected))


def test_a_weight_that_is_not_finite_propagates_to_its_row_alone(engine):
    out = torch.zeros(3, 4)
    weights = torch.tensor([[1.0], [torch.nan], [1.0]])
    weighted_gather(engine, out, torch.randn(5, 4), torch.tensor([[1], [2], [3]]), weights)
    assert out.isnan().all(-1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_add(n, m, engine):
    out = torch.randn(n, 4)
    before = out.clone()
    weighted_gather(engine, out, torch.randn(5, 4), torch.zeros(n, m, dtype=torch.int64), torch.zeros(n, m))
    assert torch.equal(out, before)


def test_more_than_one_piece(engine):
    """The eager form gathers a bounded number of entries at a time."""
    width, m = 1 << 12, 8
    rows = 2 * PIECE // (width * m) + 3
    table, ids, weights = random_case(rows, m, 12, width)
    out = torch.zeros(rows, width)
    weighted_gather(engine, out, table, ids, weights)
    torch.testing.assert_close(out, (dense(ids, weights, 12) @ table.double()).float(), rtol=1e-5, atol=1e-5)


def test_strides_of_every_operand(engine):
    """Ids and weights by columns, a table that is a slice, one stored by columns and one of a single column."""
    table, ids, weights = random_case(9, 4, 11, 6)
    wide = torch.full((11, 10), torch.nan)
    wide[:, 2:8] = table
    expected = dense(ids, weights, 11) @ table.double()
    by_columns = (x.T.contiguous().T for x in (ids, weights))
    for given in ((wide[:, 2:8], ids, weights), (table, *by_columns), (table.T.contiguous().T, ids, weights)):
        out = torch.zeros(9, 6)
        weighted_gather(engine, out, *given)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    column, out = torch.randn(1, 11).T, torch.zeros(9, 1)
    weighted_gather(engine, out, column, ids, weights)
    torch.testing.assert_close(out.double(), dense(ids, weights, 11) @ column.double(), rtol=1e-5, atol=1e-5)


def test_any_number_of_threads_gives_the_same_bits(engine):
    table, ids, weights = random_case(300, 20, 50, 200)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(torch.ones(300, 200))
            weighted_gather(engine, runs[-1], table, ids, weights)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[1], runs[2])


@pytest.mark.cpp
def test_wrong_operands_are_refused():
    out, table, ids, weights = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    for wrong, message in (
        ((torch.zeros(2, 4), table, ids, weights), "of one width"),
        ((torch.zeros(3, 3), table, ids, weights), "a row for each row of ids"),
        ((torch.zeros(3, 2).T, table, ids, weights), "out must be contiguous"),
        ((out, table, ids.int(), weights), "ids must be int64"),
        ((out, table, ids, torch.zeros(2, 2)), "weights"),
        ((out, table, ids, weights.double()), "both be float32 or both float64"),
        ((out, table.long(), ids, weights), "floating"),
    ):
        with pytest.raises(ValueError, match=message):
            weighted_gather(CPP, *wrong)
    assert not out.any()
