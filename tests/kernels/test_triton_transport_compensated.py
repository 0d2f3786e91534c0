"""The transport kernels where float64 is slow: costs whose sums are kept in two float32, against the reference in float64."""

import pytest
import torch
from torch import Tensor

from topd.ops.transport.eager import transport as reference
from topd.ops.transport.spec import WindowSide

pytest.importorskip("triton")
from topd_kernels.shared.blocks import slow_float64
from topd_kernels.shared.launch import interpreted, run_all
from topd_kernels.transport.kernels import transport as kernel
from topd_kernels.transport.launches import launches

V = 29
SLOW, FAST = "sm_120", "sm_90"
TIGHT = {"max_iterations": 3000, "tolerance": 1e-9}
Sides = tuple[WindowSide, WindowSide]


def sides_of(windows: tuple[int, int], width: int, dtype: torch.dtype, *, m: int = 1) -> Sides:
    tables = torch.randn(2, V, width).to(dtype)
    ids = [torch.randint(V, (m, window)) for window in windows]
    lengths = [torch.full((m,), window) for window in windows]
    return tuple(WindowSide(*parts) for parts in zip(tables, ids, lengths, strict=True))


def solved(sides: Sides, device: torch.device, cost: str, epsilon: float, *, family: str = SLOW, **numbers) -> list[Tensor]:
    if device.type == "cpu" and not interpreted(kernel):
        pytest.skip("CPU tensors need TRITON_INTERPRET=1")
    tensors = [x.to(device) for side in sides for x in side]
    numbers = {"max_iterations": 1000, "tolerance": 1e-4} | numbers
    order, outputs = launches(*tensors, cost, epsilon, *numbers.values(), family=family)
    run_all(order)
    return [x.cpu() for x in outputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("windows", "cost", "epsilon"),
    [((5, 4), "cosine", 0.05), ((13, 7), "cosine", 0.001), ((5, 4), "sqeuclidean", 0.01), ((4, 5), "mismatch", 0.05)],
)
def test_equals_the_reference(device, windows, cost, epsilon, dtype):
    """To what the tests of float64's sums demand: distances to 3e-6 of the unit that costs have, plans to 3e-6 of a marginal,
    row sums to 1e-9 of one."""
    sides = sides_of(windows, 37, dtype)
    distance, plan, error = solved(sides, device, cost, epsilon, **TIGHT)
    true_distance, true_plan, _ = reference(
        *(side._replace(table=side.table.double()) for side in sides), cost, epsilon, **TIGHT
    )
    unit = max(1.0, true_distance.max().item())
    torch.testing.assert_close(distance.double(), true_distance, rtol=0, atol=3e-6 * unit)
    torch.testing.assert_close(plan.double(), true_plan, rtol=0, atol=3e-6 / windows[0])
    assert (error <= 1e-9 * (1 + 1e-6)).all()


@pytest.mark.parametrize(("windows", "width"), [((9, 6), 200), ((66, 5), 40)])
@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
def test_distances_are_those_of_sums_in_float64(device, windows, width, cost):
    """On the same float32 products, in registers and by panels: a float32's last digit."""
    sides = sides_of(windows, width, torch.float32)
    result, wide = (solved(sides, device, cost, 0.05, family=family, tolerance=1e-9) for family in (SLOW, FAST))
    torch.testing.assert_close(result[0], wide[0], rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(result[1], wide[1], rtol=0, atol=1e-6 / windows[0])


def test_what_float32_would_round_off_is_kept(device):
    """One gap of 2^14 and a thousand of 1: 2^28 + 1000. A float32 at 2^28 steps by 32: a sum in it would lose each 4."""
    one, other = torch.zeros(1, 1004), torch.ones(1, 1004)
    other[0, 0], other[0, 1:4] = 2.0**14, 0.0
    at_zero = torch.zeros(1, 1, dtype=torch.int64)
    sides = tuple(WindowSide(table, at_zero, torch.ones(1, dtype=torch.int64)) for table in (one, other))
    distance, _, _ = solved(sides, device, "sqeuclidean", 0.05)
    assert abs(distance.item() - (2**28 + 1000)) <= 16


def test_cosines_at_any_scale(device):
    """float32 holds neither the squares nor, of the smallest, the inverse of the norm."""
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    scales = torch.tensor([1e30, 1e-30, 1.0, 1e-38, 1e38 / 8])[:, None]
    places, length = torch.arange(5)[None], torch.tensor([5])

    def run(student: Tensor, teacher: Tensor) -> list[Tensor]:
        sides = tuple(WindowSide(table, places, length) for table in (student, teacher))
        return solved(sides, device, "cosine", 0.05)

    for one, other in zip(run(x, y)[:2], run(x * scales, y * scales)[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)
    zero = x.clone()
    zero[0] = 0
    assert run(zero, zero)[0].item() == pytest.approx(0.2, abs=1e-3)  # at cosine 0 of everything, of itself too: one of five
    assert run(torch.zeros(5, 6), y)[0].item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_with_its_problem(device, cost, wrong):
    sides = sides_of((5, 4), 6, torch.float32, m=2)
    table = sides[0].table.clone()
    table[0, 0] = wrong
    ids = torch.randint(1, V, (2, 5))
    ids[0, -1] = 0
    result, wide = (
        solved((WindowSide(table, ids, sides[0].lengths), sides[1]), device, cost, 0.05, family=family)
        for family in (SLOW, FAST)
    )
    assert result[0].isfinite().tolist() == wide[0].isfinite().tolist() == [False, True]
    assert result[1][1].isfinite().all()


def test_repeats_bit_for_bit_and_equal_windows_are_no_distance_apart(device):
    sides = sides_of((13, 13), 300, torch.float32)
    same = sides[0], sides[0]._replace(ids=sides[0].ids.flip(1))
    result, again = solved(same, device, "cosine", 0.01), solved(same, device, "cosine", 0.01)
    for one, other in zip(result, again, strict=True):
        assert torch.equal(one, other)
    assert result[0].item() <= 1e-6


@pytest.mark.parametrize("windows", [(5, 4), (66, 5)])
def test_only_where_float64_is_slow_and_tables_are_narrower(windows):
    """A float64 table is summed in float64 everywhere."""
    for family, dtype, compensated in (
        (SLOW, torch.float32, True), ("sm_89", torch.bfloat16, True), ("gfx1100", torch.float16, True),
        (SLOW, torch.float64, False), (FAST, torch.float32, False), ("gfx942", torch.bfloat16, False),
        (None, torch.float32, False),
    ):  # fmt: skip
        sides = sides_of(windows, 6, dtype)
        (launch,), _ = launches(*(x for side in sides for x in side), "cosine", 0.05, 10, 1e-4, family=family)
        assert launch.constants["COMPENSATED"] is compensated


def test_families_with_slow_float64():
    slow = ["sm_75", "sm_86", "sm_89", "sm_103", "sm_120", "sm_121", "gfx1100", "gfx1201"]
    fast = ["sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950"]
    assert [family for family in (*slow, *fast) if slow_float64(family)] == slow
