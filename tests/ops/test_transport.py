"""The op topd::transport: the compiled kernel against the eager one, opcheck, and what it refuses."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from near_future_cases import COSTS, DTYPES, D, V

import topd
from topd.ops.transport.op import run_transport
from topd.ops.transport.spec import WindowSide

linprog = pytest.importorskip("scipy.optimize").linprog
linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
ot = pytest.importorskip("ot")


def hard_table(kind: str, dtype: torch.dtype) -> torch.Tensor:
    tokens = {"one token": 1, "duplicates": 2}.get(kind, 200)
    table = torch.randn(tokens, 16, dtype=torch.float64)
    if kind == "nearly identical":
        table = table[:1] + 1e-5 * table
    if kind == "clusters":
        table = table[:4].repeat(50, 1) + 1e-4 * table
    if kind == "some zero":
        table[::3] = 0
    return (table * {"huge": 1e6, "tiny": 1e-6}.get(kind, 1.0)).to(dtype)


HARD = ("random", "one token", "duplicates", "nearly identical", "clusters", "some zero", "huge", "tiny")


def both(
    table: torch.Tensor, k_student: int, k_teacher: int, *numbers: Any, m: int = 4, **options: Any
) -> tuple[topd.Transport, topd.Transport]:
    """The compiled op and the reference on random ragged windows."""
    sides = []
    for window in (k_student, k_teacher):
        sides.append(WindowSide(table, torch.randint(len(table), (m, window)), torch.randint(1, window + 1, (m,))))
    options = {"max_iterations": 200, "tolerance": 1e-4} | options
    compiled, reference = (topd.Transport(*run_transport(name, *sides, *numbers, **options)) for name in ("cpp", "eager"))
    return compiled, reference


def assert_agree(compiled: topd.Transport, reference: topd.Transport, *, plans: bool) -> None:
    """To 1e-5 of the distances' own scale; what float32 costs are rounded to may move a plan at a tiny epsilon."""
    for name in ("distance", "plan", "marginal_error"):
        assert getattr(compiled, name).isfinite().all(), name
        assert getattr(reference, name).isfinite().all(), name
    scale = reference.distance.abs().max().clamp_min(1).item()
    torch.testing.assert_close(compiled.distance, reference.distance, rtol=1e-5, atol=1e-5 if scale <= 1 else 1e-5 * scale)
    if plans:
        torch.testing.assert_close(compiled.plan, reference.plan, rtol=0, atol=1e-5)


@pytest.mark.cpp
@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.01, 0.001, 1e-4])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", HARD)
def test_compiled_is_the_reference(kind, cost, epsilon):
    for dtype in (torch.float32, torch.float64):
        pair = both(hard_table(kind, dtype), 21, 18, cost, epsilon)
        assert_agree(*pair, plans=dtype == torch.float64 or epsilon >= 0.01)
        assert (pair[0].marginal_error <= 1e-4).all()


@pytest.mark.cpp
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from(COSTS),
    st.floats(-4, 1),
    st.sampled_from(HARD),
    st.sampled_from([1, 2, 5, 200]),
)
def test_compiled_is_the_reference_for_any_shape(number, k_student, k_teacher, cost, exponent, kind, iterations):
    torch.manual_seed(number)
    table = hard_table(kind, torch.float64)
    assert_agree(*both(table, k_student, k_teacher, cost, 10**exponent, max_iterations=iterations), plans=True)


def op_arguments(dtype: torch.dtype, cost: str) -> tuple[Any, ...]:
    table, lengths = torch.randn(V, D).to(dtype), torch.tensor([2, 4, 1])
    ids = torch.randint(V, (3, 4)), torch.randint(V, (3, 6))
    return (table, ids[0], lengths, table.clone(), ids[1], lengths, cost, 0.05, 50, 1e-4)


@pytest.mark.cpp
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, cost):
    results = torch.library.opcheck(torch.ops.topd.transport.default, op_arguments(dtype, cost))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.cpp
def test_the_op_refuses_what_it_would_read_out_of_bounds():
    good = op_arguments(torch.float32, "cosine")
    for place, value in ((1, good[1] + V), (1, good[1] - V), (2, good[2] + 4), (5, good[5] * 0), (4, good[4][:2])):
        bad = (*good[:place], value, *good[place + 1 :])
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            torch.ops.topd.transport(*bad)
    assert torch.ops.topd.transport(*good)[0].isfinite().all()
