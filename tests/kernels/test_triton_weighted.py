"""topd::weighted_gather and topd::weighted_scatter, the Triton kernels, against loops in float64."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, NEEDS_TRITON, there

from topd.ops.shared.engines import TRITON
from topd.ops.weighted_gather.op import weighted_gather
from topd.ops.weighted_scatter.op import weighted_scatter

pytestmark = NEEDS_TRITON
NAN = math.nan


def gathered(out: Tensor, table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The formula, entry by entry, in float64."""
    out = out.double()
    for n in range(ids.shape[0]):
        for m in range(ids.shape[1]):
            if weights[n, m] != 0 and 0 <= ids[n, m] < table.shape[0]:
                out[n] += weights[n, m].double() * table[ids[n, m]].double()
    return out


def scattered(out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = out.double()
    for n in range(ids.shape[0]):
        for m in range(ids.shape[1]):
            if weights[n, m] != 0 and 0 <= ids[n, m] < out.shape[0]:
                out[ids[n, m]] += weights[n, m].double() * rows[n].double()
    return out


OPS = {"gather": (weighted_gather, gathered), "scatter": (weighted_scatter, scattered)}


def by_triton(name: str, out: Tensor, source: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = out.to(DEVICE, copy=True)
    assert OPS[name][0](TRITON, out, *(there(x) for x in (source, ids, weights))) is None
    return out.cpu()


def random_case(name: str, n: int, m: int, vocab: int, width: int, dtype: torch.dtype, sums: torch.dtype) -> tuple[Tensor, ...]:
    """out, the source, ids with repeats within a row and across rows, of which some lie outside, and weights."""
    ids = torch.randint(-2, vocab + 3, (n, m))
    ids[:, m // 2 :] = ids[:, : m - m // 2]
    sizes = (n, vocab) if name == "gather" else (vocab, n)
    return torch.randn(sizes[0], width, dtype=sums), torch.randn(sizes[1], width).to(dtype), ids, torch.randn(n, m, dtype=sums)


@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_is_the_loop(name, dtype, sums):
    """Added to what is there, in out's dtype, whatever the source's."""
    case = random_case(name, 6, 5, 7, 20, dtype, sums)
    result = by_triton(name, *case)
    assert result.dtype == sums
    tolerance = 1e-14 if sums == torch.float64 else 5e-7
    expected = OPS[name][1](*case)
    assert ((result.double() - expected).abs() <= tolerance * (1 + expected.abs().max())).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 5, 600), (2, 70, 3, 512), (60, 1, 4, 3), (2, 3, 40, 513)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_sizes(name, sizes):
    """Widths below, at and above a block's; more ids than entries of the vocabulary."""
    case = random_case(name, *sizes, torch.float32, torch.float64)
    torch.testing.assert_close(by_triton(name, *case), OPS[name][1](*case), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", OPS)
def test_a_weight_of_zero_and_an_id_outside_add_nothing_whatever_is_there(name):
    """Rows and entries of NaN beside weights of 0 and -0; weights that are not finite at ids outside."""
    ids = torch.tensor([[1, 0], [0, 3], [-1, 7], [3, 5]])
    weights = torch.tensor([[2.0, -1.0], [0.0, -0.0], [NAN, 4.0], [0.5, math.inf]])
    source = torch.randn(4 if name == "scatter" else 5, 8)
    source[[1, 2] if name == "scatter" else [2, 4]] = NAN
    out = torch.ones(5 if name == "scatter" else 4, 8)
    expected = OPS[name][1](out, source, ids, weights)
    assert expected.isfinite().all()
    torch.testing.assert_close(by_triton(name, out, source, ids, weights).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_what_is_not_finite_propagates_to_its_own_row_alone(name):
    out, source, ids, weights = random_case(name, 4, 1, 4, 3, torch.float32, torch.float32)
    ids[:] = torch.tensor([[0], [2], [2], [3]])
    weights[1] = NAN
    result = by_triton(name, out, source, ids, weights)
    hit = 1 if name == "gather" else 2
    assert result.isnan().all(-1).tolist() == [row == hit for row in range(4)]
    assert result[[row for row in range(4) if row != hit]].isfinite().all()


def often(n: int, m: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out of 5 rows; 1 stands in most entries, 0 in a third of one segment, 2 and 4 in a few, 3 in none; some lie outside."""
    ids = torch.ones(n, m, dtype=torch.int64)
    ids.view(-1)[torch.randperm(n * m)[:80]] = torch.tensor([0, 0, 2, 4, 4, -1, 5, 2]).repeat(10)
    return torch.randn(5, width, dtype=dtype), torch.randn(n, width).bfloat16(), ids, torch.randn(n, m, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(96, 1, 3), (90, 2, 130)], ids=str)
def test_an_id_in_most_entries(sizes, dtype):
    """Its entries fill a segment and more; each run gives the same bits."""
    n, m, width = sizes
    out, rows, ids, weights = often(n, m, width, dtype)
    result = by_triton("scatter", out, rows, ids, weights)
    counts = (ids >= 0) & (ids < 5)
    added = (weights.double() * counts).flatten().unsqueeze(-1) * rows.double().repeat_interleave(m, 0)
    expected = out.double().index_add(0, ids.flatten().clamp(0, 4), added)
    assert ((result - expected).abs() <= 1e3 * torch.finfo(dtype).eps * (1 + expected.abs())).all()
    assert torch.equal(result[3], out[3])
    assert torch.equal(result, by_triton("scatter", out, rows, ids, weights))


@pytest.mark.parametrize("n", [64, 360])
def test_no_program_reads_more_than_a_segment(n, monkeypatch):
    """However often an id comes: three numbers and a row for each of 32 entries, then a step for 32 segments."""
    from triton.runtime.interpreter import interpreter_builder

    from topd_kernels.shared.launch import interpreted
    from topd_kernels.weighted_scatter import launches
    from topd_kernels.weighted_scatter.kernels import scatter

    if not interpreted(scatter):
        pytest.skip("the kernels run on a GPU here; counting needs Triton's interpreter")
    loads: Counter[tuple[int, ...]] = Counter()
    load = interpreter_builder.create_masked_load

    def counted(*arguments):
        loads[tuple(map(int, interpreter_builder.grid_idx))] += 1
        return load(*arguments)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", counted, raising=False)
    out, rows, ids, weights = torch.zeros(2, 8), torch.randn(n, 8), torch.ones(n, 3, dtype=torch.int64), torch.randn(n, 3)
    most = []
    for launch in launches.launches(out, rows, ids, weights):
        loads.clear()
        launch.run()
        most.append(max(loads.values()))
    assert most == [3 + 4 * 32, 4 + 3 * -(-n * 3 // 1024)]
    assert not out[0].any()
    expected = weights.double().sum(1) @ rows.double()
    assert ((out[1] - expected).abs() <= 1e-6 * weights.abs().sum()).all()


@pytest.mark.parametrize("name", OPS)
def test_the_order_of_a_sum_is_that_of_its_entries(name):
    """1e8 + 1 - 1e8 is 0 in float32, 1e8 - 1e8 + 1 is 1; repeated runs give the same bits."""
    out, source = torch.zeros(2 if name == "gather" else 3, 1), torch.ones(3 if name == "gather" else 2, 1)
    ids = torch.tensor([[0, 0, 0], [1, 1, 1]])
    weights = torch.tensor([[1e8, 1.0, -1e8], [1e8, -1e8, 1.0]])
    result = by_triton(name, out, source, ids, weights)
    assert result[:2, 0].tolist() == [0, 1]
    case = random_case(name, 30, 4, 3, 5, torch.float32, torch.float32)
    assert torch.equal(by_triton(name, *case), by_triton(name, *case))


@pytest.mark.parametrize("name", OPS)
def test_strides_of_every_operand(name):
    """Sources that are a slice of wider rows, every other row, one row expanded, stored by columns; ids and weights by columns;
    out a slice of wider rows, whose other entries stay."""
    out, source, ids, weights = random_case(name, 5, 3, 6, 4, torch.float32, torch.float64)
    wide = torch.full((2 * source.shape[0], 9), NAN)
    wide[::2, 2:6] = source
    by_columns = (x.T.contiguous().T for x in (ids, weights))
    op, loop = OPS[name]
    cases = [
        (wide[::2, 2:6], ids, weights),
        (source, *by_columns),
        (source[:1].expand(source.shape), ids, weights),
        (source.T.contiguous().T, ids, weights),
    ]
    for case in cases:
        larger = torch.full((out.shape[0], 7), -3.0, dtype=torch.float64, device=DEVICE)
        larger[:, 1:5] = out.to(DEVICE)
        op(TRITON, larger[:, 1:5], *(x.to(DEVICE) for x in case))
        torch.testing.assert_close(larger[:, 1:5].cpu(), loop(out, *case), rtol=1e-13, atol=1e-13)
        assert (larger[:, [0, 5, 6]] == -3).all()


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", OPS)
def test_nothing_to_add(name, n, m):
    out, source, ids, weights = random_case(name, n, m, 5, 4, torch.float32, torch.float32)
    assert torch.equal(by_triton(name, out, source, ids, weights), out)


@pytest.mark.parametrize("name", OPS)
def test_every_id_outside(name):
    out, source, ids, weights = random_case(name, 2, 3, 5, 4, torch.bfloat16, torch.float32)
    assert torch.equal(by_triton(name, out, source, torch.where(ids % 2 == 0, -1, 5), weights), out)
