"""topd.near_future_divergence: lengths, vectors in place of tokens, dtypes, strides, threads and what is not finite."""

import math
from collections.abc import Callable

import pytest
import torch
from memory_watch import Largest
from near_future_cases import COSTS, DTYPES, D, M, V, equal_bits, lengths_of, random_case

from topd import near_future_divergence
from topd.ops.transport.op import run_transport
from topd.ops.transport.spec import WindowSide

linprog = pytest.importorskip("scipy.optimize").linprog
linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
ot = pytest.importorskip("ot")


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_a_padded_pair_is_the_pair_alone(cost, solver):
    case = random_case(9, 6, m=5, ragged=True)
    transport = near_future_divergence(**case, cost=cost, solver=solver)
    sizes = zip(lengths_of(case, "student"), lengths_of(case, "teacher"), strict=True)
    for i, (rows, columns) in enumerate(sizes):
        student, teacher = case["student_tokens"][i : i + 1, :rows], case["teacher_tokens"][i : i + 1, :columns]
        alone = near_future_divergence(student, teacher, case["embedding"], cost=cost, solver=solver)
        torch.testing.assert_close(transport.plan[i, :rows, :columns], alone.plan[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(transport.distance[i], alone.distance[0], rtol=1e-9, atol=1e-12)
        assert transport.plan[i, rows:].eq(0).all()
        assert transport.plan[i, :, columns:].eq(0).all()


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_no_pairs(cost, solver):
    transport = near_future_divergence(**random_case(3, 5, m=0), cost=cost, solver=solver)
    assert (transport.distance.shape, transport.plan.shape, transport.marginal_error.shape) == ((0,), (0, 3, 5), (0,))


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_vectors_in_place_of_tokens(case, cost, solver):
    vectors = {f"{side}_vectors": case["embedding"][case[f"{side}_tokens"].clamp(0, V - 1)] for side in ("student", "teacher")}
    lengths = {name: value for name, value in case.items() if "lengths" in name}
    transport = near_future_divergence(**vectors, **lengths, cost=cost, solver=solver)
    expected = near_future_divergence(**case, cost=cost, solver=solver)
    assert equal_bits(transport, expected)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_tables_and_results(case, dtype, solver, cost):
    """The result is that of the table's own values in float64, to float32's rounding."""
    case["embedding"] = case["embedding"].to(dtype)
    transport = near_future_divergence(**case, cost=cost, solver=solver)
    expected = near_future_divergence(**{**case, "embedding": case["embedding"].double()}, cost=cost, solver=solver)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for part in (transport.distance, transport.plan, transport.marginal_error)} == {wanted}
    torch.testing.assert_close(transport.distance.double(), expected.distance, rtol=1e-5, atol=1e-6)
    if solver == "sinkhorn":
        torch.testing.assert_close(transport.plan.double(), expected.plan, rtol=0, atol=1e-5)


def test_results_are_constants_and_the_table_may_require_grad(case):
    embedding = case.pop("embedding").requires_grad_()
    transport = near_future_divergence(**case, embedding=embedding)
    assert not any(part.requires_grad for part in (transport.distance, transport.plan, transport.marginal_error))


def test_mismatch_needs_no_embedding_and_reads_none(case):
    embedding = case.pop("embedding")
    transport = near_future_divergence(**case, cost="mismatch")
    other = near_future_divergence(**case, embedding=torch.full_like(embedding[:1], math.nan).float(), cost="mismatch")
    assert equal_bits(transport, other)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_non_contiguous_operands(case, view, cost):
    expected = near_future_divergence(**case, cost=cost)
    strided = {name: value if value.dim() == 1 else view(value) for name, value in case.items()}
    assert not strided["embedding"].is_contiguous()
    assert equal_bits(near_future_divergence(**strided, cost=cost), expected)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("cost", COSTS)
def test_bits_repeat_with_any_number_of_threads(cost, threads):
    case = random_case(30, 25, m=12, ragged=True)
    case["embedding"] = case["embedding"].float()
    runs = []
    for count in (1, 2, 2, 1):
        threads(count)
        runs.append(near_future_divergence(**case, cost=cost))
    assert all(equal_bits(runs[0], each) for each in runs[1:])


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_nan_is_not_hidden(cost, side):
    """In a vector that counts it makes that pair's distance NaN, and no other's; past the length it is not read."""
    vectors = {"student_vectors": torch.randn(3, 4, D), "teacher_vectors": torch.randn(3, 4, D)}
    vectors[f"{side}_vectors"][1:, 2, 0] = math.nan
    lengths = {f"{side}_lengths": torch.tensor([4, 4, 2])}
    transport = near_future_divergence(**vectors, **lengths, cost=cost)
    assert transport.distance.isnan().tolist() == [False, True, False]
    assert (transport.marginal_error <= 1e-4).tolist() == [True, False, True]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_cosine_does_not_depend_on_the_scale(scale):
    """Squares of these float32 numbers leave the range of float32; the vectors themselves do not."""
    x, y = torch.randn(2, M, 5, 64).unbind()
    expected = near_future_divergence(student_vectors=x, teacher_vectors=y)
    transport = near_future_divergence(student_vectors=x * scale, teacher_vectors=y)
    torch.testing.assert_close(transport.distance, expected.distance, rtol=1e-5, atol=1e-6)


def ints(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value)


@pytest.mark.parametrize("solver", ["sinkhorn", "exact", "eager"])
def test_no_tensor_of_the_tables_size_is_made(solver):
    """Only the windows' rows of the table are read."""
    table, student, teacher = torch.randn(20_000, D), ints(3, 5), ints(3, 4)
    largest = Largest()
    with largest:
        if solver == "eager":
            full = [torch.full((3,), ids.shape[1]) for ids in (student, teacher)]
            windows = WindowSide(table, student, full[0]), WindowSide(table, teacher, full[1])
            distance = run_transport("eager", *windows, "cosine", 0.05, max_iterations=200, tolerance=1e-4)[0]
        else:
            distance = near_future_divergence(student, teacher, table, solver=solver).distance
    assert distance.shape == (3,)
    assert 0 < largest.nbytes < 20_000
