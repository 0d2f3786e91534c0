"""linear_divergence of few rows on the CPU, where dlogits are kept for the backward pass, and the head's gradients made there.

`compare.random_problem` has width 7, so that 6 rows are few and its usual 11 are not.
"""

import compare
import pytest
import torch
from matrix_products import H, V, matrix_products

import topd

pytestmark = pytest.mark.cpp
OPTIONS = pytest.mark.parametrize("options", compare.OPTIONS.values(), ids=compare.OPTIONS.keys())
FEW = 6


def problem_of(options, divergence=compare.DIVERGENCES[2], dtype=torch.float32, n=FEW, seed=0):
    torch.manual_seed(seed)
    return compare.random_problem(options, divergence, n=n).to(dtype)


def uneven(problem):
    return torch.linspace(-1, 2, problem.student.hidden.shape[0])


@OPTIONS
@pytest.mark.parametrize("divergence", compare.DIVERGENCES, ids=str)
def test_against_float64_under_any_weights(divergence, options):
    problem = problem_of(options, divergence, torch.float64)
    truth = compare.plain(problem, uneven(problem))
    compare.assert_outcome(compare.by_topd(problem, "cpp", uneven(problem)), truth, 1e-11)


@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager_at_its_dtype(dtype, options):
    """Element by element, over eight problems: of a single one an element of eager's is exact by luck on one processor or the
    other, where the error of both is that of float32 logits."""
    errors: dict[str, list[torch.Tensor]] = {}
    for seed in range(8):
        problem = problem_of(options, dtype=dtype, seed=seed)
        truth, yardstick = (compare.plain(problem, uneven(problem), dtype=each) for each in (torch.float64, None))
        outcome = compare.by_topd(problem, "cpp", uneven(problem))
        triples = {"value": (outcome.value, yardstick.value.float(), truth.value)}
        triples |= {name: (grad, yardstick.grads[name], truth.grads[name]) for name, grad in outcome.grads.items()}
        for name, triple in triples.items():
            scaled = [each / triple[2].abs().max() for each in compare.error_and_allowed(*triple, compare.CONSTANT)]
            errors.setdefault(name, []).append(torch.stack(scaled))
    for name, each in errors.items():
        error, allowed = torch.stack(each).square().mean(0).sqrt()
        assert bool((error <= allowed).all()), f"{name}: an element is {(error / allowed).max():.3g} times as wrong as allowed"


@OPTIONS
def test_the_same_as_in_chunks(options):
    """A workspace of one row cannot keep all of them; sums that forward makes differ by rounding alone."""
    problem = problem_of(options, dtype=torch.float64)
    one_row = 8 * (problem.student.weight.shape[0] + problem.teacher.weight.shape[0])
    kept = compare.by_topd(problem, "cpp", uneven(problem))
    chunked = compare.by_topd(problem, "cpp", uneven(problem), workspace_bytes=one_row)
    compare.assert_outcome(kept, chunked, 1e-12)


def test_any_weights_cost_four_products():
    torch.manual_seed(0)
    student = topd.Head(torch.nn.Parameter(torch.randn(V, H)))
    hidden, teacher = torch.randn(H, H, requires_grad=True), (torch.randn(H, H), topd.Head(torch.randn(V, H)))
    upstream = torch.randn(H)

    def run(**options):
        topd.linear_divergence(hidden, student, *teacher, backend="cpp", **options).backward(upstream)

    unit = 96 / H  # matrix_products counts in products of 96 rows
    assert matrix_products(run) * unit == 4
    assert matrix_products(lambda: run(workspace_bytes=2 * V * 4 * (H // 2))) * unit > 4  # two chunks: rows deviate


def test_forward_makes_no_gradient_of_the_head():
    torch.manual_seed(0)
    student = topd.Head(torch.nn.Parameter(torch.randn(V, H)))
    hidden, teacher = torch.randn(H // 2, H), (torch.randn(H // 2, H), topd.Head(torch.randn(V, H)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        topd.linear_divergence(hidden, student, *teacher, backend="cpp")
    assert max(event.cpu_memory_usage for event in profiled.events()) < V * H * 4


@OPTIONS
def test_a_second_backward_gives_the_same_bits(options):
    problem = problem_of(options)
    student = problem.student.leaves(compare.TENSORS)
    sides = (student.hidden, student.head(), problem.teacher.hidden, problem.teacher.head())
    value = topd.linear_divergence(*sides, **problem.options(), backend="cpp")
    leaves = [each for name in compare.TENSORS if (each := getattr(student, name)) is not None]
    first, second = (torch.autograd.grad(value, leaves, uneven(problem), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("scores", [False, True])
def test_scores_beside_it(scores):
    """With scores the student's tile is as wide as its own vocabulary."""
    problem = problem_of(compare.OPTIONS["student_larger"], dtype=torch.float64)
    student = problem.student.leaves(compare.TENSORS)
    sides = (student.hidden, student.head(), problem.teacher.hidden, problem.teacher.head())
    result = topd.linear_divergence(*sides, **problem.options(), backend="cpp", return_scores=scores)
    value = result[0] if scores else result
    value.backward(uneven(problem).double())
    truth = compare.plain(problem, uneven(problem))
    compare.assert_near(student.weight.grad, truth.grads["weight"], 1e-11, "weight")


def test_a_row_without_a_distribution():
    """Its own gradient is NaN unless it is weighted with 0; then it leaves all others alone."""
    problem = problem_of({}, dtype=torch.float64)
    weights = uneven(problem)
    problem.student.hidden[2] = torch.nan
    poisoned = compare.by_topd(problem, "cpp", weights)
    assert poisoned.grads["weight"].isnan().all()
    weights[2] = 0.0
    clean = compare.by_topd(problem, "cpp", weights)
    problem.student.hidden[2] = 0.0
    truth = compare.plain(problem, weights)
    compare.assert_near(clean.grads["weight"], truth.grads["weight"], 1e-11, "weight")
    assert not clean.grads["hidden"][2].any()


@pytest.mark.parametrize("rows", [0, 1, 5, FEW])
def test_masks(rows):
    problem = problem_of({}, dtype=torch.float64)
    mask = torch.arange(FEW) < rows
    problem = compare.replace(problem, mask=mask)
    weights = uneven(problem).masked_fill(~mask, torch.nan)
    outcome = compare.by_topd(problem, "cpp", weights)
    truth = compare.plain(problem, weights.nan_to_num(0.0))
    compare.assert_near(outcome.grads["weight"], truth.grads["weight"], 1e-11, "weight")
    assert not outcome.grads["hidden"][~mask].any()


def test_compiled():
    """In one graph for any number of rows nothing is kept: the same gradient by the other way."""
    problem = problem_of(compare.OPTIONS["everything"], dtype=torch.float64)
    student = problem.student.leaves(compare.TENSORS)
    head, teacher = student.head(), problem.teacher.head()

    def loss(hidden, teacher_hidden):
        return topd.linear_divergence(hidden, head, teacher_hidden, teacher, **problem.options(), backend="cpp").sum()

    loss(student.hidden, problem.teacher.hidden).backward()
    expected = student.weight.grad.clone()
    student.weight.grad = None
    torch.compile(loss, backend="aot_eager", fullgraph=True)(student.hidden, problem.teacher.hidden).backward()
    compare.assert_near(student.weight.grad, expected, 1e-12, "weight")
