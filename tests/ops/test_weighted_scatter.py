"""weighted_scatter, out[ids[n, m]] += weights[n, m] rows[n], against a dense matrix of weights."""

import pytest
import torch
from torch import Tensor
from weighted_cases import DTYPES, dense, random_ids

from topd.ops.shared.engines import CPP
from topd.ops.weighted_gather.op import PIECE
from topd.ops.weighted_scatter.op import weighted_scatter


def random_case(n: int, m: int, vocab: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids with repeats within a row and across rows, of which some lie outside, and weights."""
    ids = random_ids(n, m, vocab)
    return torch.randn(n, width).to(dtype), ids, torch.randn(n, m)


@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (7, 3, 5, 1), (9, 50, 11, 33), (40, 1, 300, 64), (5, 4, 6, 1025)], ids=str)
def test_is_the_dense_product(sizes, dtype, sums, engine):
    """Added to what is there, in out's dtype, whatever the rows'."""
    rows, ids, weights = random_case(*sizes, dtype)
    out, weights = torch.randn(sizes[2], sizes[3], dtype=sums), weights.to(sums)
    expected = out.double() + dense(ids, weights, sizes[2]).T @ rows.double()
    assert weighted_scatter(engine, out, rows, ids, weights) is None
    assert out.dtype == sums
    tolerance = 1e-13 if sums == torch.float64 else 3e-6
    assert ((out - expected).abs() <= tolerance * (1 + expected.abs().max())).all()


def test_a_weight_of_zero_and_an_id_outside_add_nothing_whatever_the_row_holds(engine):
    rows = torch.randn(4, 8)
    rows[[1, 2]] = torch.nan
    ids = torch.tensor([[1, 0], [0, 3], [-1, 7], [3, 7]])
    weights = torch.tensor([[2.0, -1.0], [0.0, -0.0], [torch.nan, 4.0], [0.5, torch.inf]])
    out = torch.ones(5, 8)
    weighted_scatter(engine, out, rows, ids, weights)
    expected = torch.ones(5, 8)
    expected[0] -= rows[0]
    expected[1] += 2 * rows[0]
    expected[3] += 0.5 * rows[3]
    torch.testing.assert_close(out, expected)


def test_a_weight_that_is_not_finite_propagates_to_its_id_alone(engine):
    out = torch.zeros(4, 3)
    weights = torch.tensor([[1.0, torch.nan, 1.0]])
    weighted_scatter(engine, out, torch.randn(1, 3), torch.tensor([[0, 2, 3]]), weights)
    assert out.isnan().all(-1).tolist() == [False, False, True, False]
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_add(n, m, engine):
    out = torch.randn(5, 4)
    before = out.clone()
    weighted_scatter(engine, out, torch.randn(n, 4), torch.zeros(n, m, dtype=torch.int64), torch.zeros(n, m))
    assert torch.equal(out, before)


def test_more_than_one_piece(engine):
    """The eager form expands a bounded number of entries at a time."""
    width, m = 1 << 12, 8
    n = 2 * PIECE // (width * m) + 3
    rows, ids, weights = random_case(n, m, 12, width)
    out = torch.zeros(12, width)
    weighted_scatter(engine, out, rows, ids, weights)
    expected = dense(ids, weights, 12).T @ rows.double()
    assert ((out - expected).abs() <= 3e-6 * expected.abs().max()).all()


def test_strides_of_every_operand(engine):
    """Ids and weights by columns, rows that are a slice, one expanded, and stored by columns."""
    rows, ids, weights = random_case(9, 4, 11, 6)
    wide = torch.full((9, 10), torch.nan)
    wide[:, 2:8] = rows
    by_columns = (x.T.contiguous().T for x in (ids, weights))
    same = rows[:1].expand(9, 6)
    for given in (
        (wide[:, 2:8], ids, weights),
        (rows, *by_columns),
        (same, ids, weights),
        (rows.T.contiguous().T, ids, weights),
    ):
        out = torch.zeros(11, 6)
        weighted_scatter(engine, out, *given)
        expected = dense(ids, weights, 11).T @ given[0].double()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_any_number_of_threads_and_any_run_gives_the_same_bits(engine):
    """Many rows of one id: the order of its sum is fixed."""
    rows, ids, weights = random_case(600, 8, 5, 64)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, *[2] * 10):
            torch.set_num_threads(count)
            runs.append(torch.ones(5, 64))
            weighted_scatter(engine, runs[-1], rows, ids, weights)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[0], again) for again in runs[1:])


@pytest.mark.cpp
def test_wrong_operands_are_refused():
    out, rows, ids, weights = torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    for wrong, message in (
        ((torch.zeros(5, 4), rows, ids, weights), "of one width"),
        ((out, torch.zeros(3, 3), ids, weights), "a row for each row of ids"),
        ((torch.zeros(3, 5).T, rows, ids, weights), "out must be contiguous"),
        ((out, rows, ids.int(), weights), "ids must be int64"),
        ((out, rows, ids, torch.zeros(2, 2)), "weights"),
        ((out, rows, ids, weights.double()), "both be float32 or both float64"),
        ((out, rows.long(), ids, weights), "floating"),
    ):
        with pytest.raises(ValueError, match=message):
            weighted_scatter(CPP, *wrong)
    assert not out.any()
