"""backend="triton" through the public functions: against the reference in float64, or against what 16 bits can hold."""

from typing import Any

import compare
import pytest
import torch
from compare import TENSORS, Outcome, by_topd, random_problem
from score_truth import true_scores
from torch import Tensor
from triton_cases import (
    DEVICE,
    FLOAT32,
    NEEDS_TRITON,
    STORED,
    assert_within,
    plan_of,
    true_dlogits,
)

import topd
from topd.ops.shared.plan import Products, plan_chunks

pytestmark = NEEDS_TRITON

FULL = {
    "student": {"bias": True, "rank": 2, "softcap": 8.0, "scale": 0.8, "vocab": 23},
    "teacher": {"bias": True, "rank": 2, "scale": -1.3},
    "temperature": 1.6,
    "hard_weight": 0.25,
}
N, VOCAB = 6, 19
NARROW = pytest.mark.parametrize("dtype", STORED, ids=str)


def problem_of(options: dict[str, Any], divergence: topd.Divergence = topd.ReverseKL()) -> compare.Problem:  # noqa: B008
    return random_problem(options, divergence, n=N, vocab=VOCAB).to(DEVICE)


def both(
    problem: compare.Problem, upstream: Tensor, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Outcome, Outcome]:
    """By the kernels on the problem in dtype, and by the reference in float64 on those very numbers."""
    problem = problem.to(dtype)
    true = by_topd(problem.to(torch.float64), "reference", upstream.double())
    return by_topd(problem, "triton", upstream, **options), true


@pytest.mark.parametrize(
    ("options", "divergence"),
    [
        ({}, topd.ForwardKL()),
        (FULL, topd.ReverseKL()),
        (FULL | {"mask": True}, topd.JSD(0.3)),
        (FULL | {"student": FULL["student"] | {"vocab": VOCAB}, "teacher": {"vocab": 30}}, topd.SkewKL()),
    ],
    ids=["plain", "everything", "masked", "teacher wider"],
)
def test_divergences_and_all_gradients(options, divergence):
    """An upstream gradient of its own for each row; chunks of two rows."""
    problem = problem_of(options, divergence)
    upstream = torch.randn(N, device=DEVICE)
    result, true = both(problem, upstream, workspace_bytes=2 * 4 * 2 * VOCAB)
    compare.assert_outcome(result, true, FLOAT32)
    assert all(result.grads[name].any() for name in result.grads)


def test_float64_is_exact():
    problem = problem_of(FULL | {"mask": True}, topd.SkewReverseKL())
    result, true = both(problem, torch.randn(N, device=DEVICE), torch.float64)
    compare.assert_outcome(result, true, 1e-12)


def test_scores():
    problem = problem_of(FULL | {"mask": True}).to(torch.float32)
    sides = problem.student.hidden, problem.student.head(), problem.teacher.hidden, problem.teacher.head()
    value, scores = topd.linear_divergence(*sides, **problem.options(), return_scores=True, backend="triton")
    true = true_scores(problem)
    assert not value[~problem.mask].any()
    for name, expected in true.items():
        compare.assert_near(getattr(scores, name).double(), expected.double(), FLOAT32, name)


UPSTREAMS = {
    "ones": lambda: torch.ones(N),
    "expanded scalar": lambda: torch.tensor(-0.3).expand(N),
    "one row out": lambda: 0.7 * (torch.arange(N) != 2),
    "one row in": lambda: 0.7 * (torch.arange(N) == 2),
    "all different": lambda: torch.randn(N),
}
HINTS = {"none": lambda grad: None, "right": lambda grad: -3 * grad, "wrong": lambda grad: torch.randn(N)}


@pytest.mark.parametrize(
    ("upstream", "hint"),
    [*((upstream, "none") for upstream in UPSTREAMS), ("one row out", "right"), *((u, "wrong") for u in list(UPSTREAMS)[1:4])],
)
def test_any_upstream_gradient_and_any_hint(upstream, hint):
    grad = UPSTREAMS[upstream]()
    guess = HINTS[hint](grad)
    options = {} if guess is None else {"weights_hint": guess.to(DEVICE)}
    result, true = both(problem_of({"student": {"bias": True}}), grad.to(DEVICE), **options)
    compare.assert_outcome(result, true, FLOAT32)
    assert not result.grads["hidden"][(grad == 0).to(DEVICE)].any()


@NARROW
@pytest.mark.parametrize("workspace_bytes", [None, 480], ids=["one chunk", "piles"])
def test_16_bits_cost_what_rounding_dlogits_costs(workspace_bytes, dtype):
    """Values as in float32 on the same numbers; gradients off by no more than what storing dlogits and the weighted hidden
    states in 16 bits changes. 480 bytes make two piles of chunks."""
    problem = problem_of({"student": {"bias": True, "softcap": 8.0}}).to(dtype)
    upstream, side = torch.randn(N, device=DEVICE), problem.student
    hint = upstream * torch.tensor([1.0, 1, 1, 1, -2, 1], device=DEVICE)
    result, true = both(problem, upstream, dtype, weights_hint=hint, workspace_bytes=workspace_bytes)
    compare.assert_near(result.value.double(), true.value, FLOAT32, "value")
    relative, least = STORED[dtype]
    dlogits = true_dlogits(problem).abs()
    stored = relative * dlogits + least
    hidden, weight, g = side.hidden.double().abs(), side.weight.double().abs(), upstream.double().abs().unsqueeze(-1)
    # A weighted hidden state is rounded under the hint, and once more where its row is redone.
    rounding = 3 * torch.finfo(dtype).eps / 2
    assert_within(result.grads["hidden"], true.grads["hidden"], g * (stored @ weight), "gradient of hidden")
    allowed = stored.T @ (g * hidden) + rounding * dlogits.T @ (g * hidden)
    assert_within(result.grads["weight"], true.grads["weight"], allowed, "gradient of weight")
    allowed = ((stored + rounding * dlogits) * g).sum(0)
    assert_within(result.grads["bias"], true.grads["bias"], allowed, "gradient of bias")
    if workspace_bytes is not None:
        plan = plan_of(problem, workspace_bytes)
        assert plan.pile > 1
        assert len(plan.piles()) > 1


def test_16_bit_adapter_and_mask():
    """bfloat16, every option: within a few of its roundings of the largest."""
    problem = problem_of(FULL | {"mask": True}, topd.JSD())
    result, true = both(problem, torch.ones(N, device=DEVICE), torch.bfloat16)
    compare.assert_near(result.value.double(), true.value, FLOAT32, "value")
    for name in TENSORS:
        compare.assert_near(result.grads[name].double(), true.grads[name], 2**-7, name)
    assert not result.grads["hidden"][~problem.mask].any()


def lone_feature(dtype: torch.dtype, n: int = N) -> Tensor:
    """Hidden states whose last feature only row 2 has: what is left of that row in a gradient stands alone there."""
    hidden = torch.randn(n, 8, device=DEVICE)
    hidden[:, 7] = 0
    hidden[2, 7] = 1.37
    return hidden.to(dtype)


@pytest.mark.parametrize("dtype", [*STORED, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["divergence", "logprobs"])
def test_a_row_taken_away_leaves_no_residue(op, dtype):
    """Its upstream gradient is 0 where the hint said otherwise: the gradients are those without it, to float32 rounding."""
    hidden, weight = lone_feature(dtype), torch.randn(VOCAB, 8, device=DEVICE).to(dtype)
    teacher = torch.randn(N, 8, device=DEVICE).to(dtype), topd.Head(torch.randn(VOCAB, 8, device=DEVICE).to(dtype))
    ids = torch.randint(VOCAB, (N, 3), device=DEVICE)
    hint = torch.tensor([0.9, 1.1, 0.77, -0.6, 1.3, 0.4], device=DEVICE)
    upstream = 0.37 * hint
    upstream[2] = 0

    def gradient(rows: Tensor, grad: Tensor) -> Tensor:
        head = topd.Head(weight.clone().requires_grad_())
        if op == "divergence":
            value = topd.linear_divergence(
                hidden[rows], head, teacher[0][rows], teacher[1], weights_hint=hint[rows], backend="triton"
            )
        else:
            value = topd.linear_logprobs(hidden[rows], head, ids[rows], weights_hint=hint[rows], backend="triton").sum(-1)
        value.backward(grad[rows])
        return head.weight.grad.double()

    every, kept = torch.arange(N, device=DEVICE), torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    result, without, present = gradient(every, upstream), gradient(kept, upstream), gradient(every, 0.37 * hint)
    size = present[:, 7].abs().max()
    assert size > 0.01
    assert result[:, 7].abs().max() <= 1e-6 * size
    assert ((result - without).abs() <= torch.finfo(dtype).eps * without.abs() + 2e-6 * without.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["divergence", "logprobs"])
def test_a_row_of_nan_under_no_weight_leaves_clean_gradients(op, dtype):
    """Those of the other rows alone, to float32 rounding; under a weight it is NaN everywhere, as in eager torch."""
    hidden, weight = torch.randn(N, 8, device=DEVICE).to(dtype), torch.randn(VOCAB, 8, device=DEVICE).to(dtype)
    hidden[1] = torch.nan
    teacher = topd.Head(torch.randn(VOCAB, 8, device=DEVICE).to(dtype))
    ids, every = torch.randint(VOCAB, (N, 3), device=DEVICE), torch.arange(N, device=DEVICE)

    def gradients(rows: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        leaves = hidden[rows].requires_grad_(), weight.clone().requires_grad_()
        if op == "divergence":
            value = topd.linear_divergence(leaves[0], topd.Head(leaves[1]), leaves[0].detach(), teacher, backend="triton")
        else:
            value = topd.linear_logprobs(leaves[0], topd.Head(leaves[1]), ids[rows], backend="triton").sum(-1)
        assert value.isnan().equal(rows == 1)
        value.backward(upstream)
        return leaves[0].grad, leaves[1].grad.double()

    kept = every != 1
    upstream = kept * torch.tensor([0.4, 7.0, 0.4, -0.3, 0.4, 0.4], device=DEVICE)
    (states, result), (expected, without) = gradients(every, upstream), gradients(every[kept], upstream[kept])
    assert not states[1].any()
    torch.testing.assert_close(states[kept], expected, rtol=1e-5, atol=1e-6)
    assert ((result - without).abs() <= torch.finfo(dtype).eps * without.abs() + 2e-6 * without.abs().max()).all()
    assert gradients(every, torch.ones_like(upstream))[1].isnan().all()


def test_a_second_backward_through_a_retained_graph_gives_the_same():
    """And the first upstream gradient after another one: nothing that was saved has changed."""
    problem = problem_of({"student": {"bias": True, "rank": 2}}).to(torch.bfloat16)
    student = problem.student.leaves(TENSORS)
    sides = student.hidden, student.head(), problem.teacher.hidden, problem.teacher.head()
    value = topd.linear_divergence(*sides, backend="triton", workspace_bytes=480)
    leaves = [getattr(student, name) for name in TENSORS]
    g = torch.randn(N, device=DEVICE)
    first, other, again = (torch.autograd.grad(value, leaves, each, retain_graph=True) for each in (g, torch.ones_like(g), g))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_compiled_without_a_break():
    """fullgraph, forward and backward, a layer before the op, in bfloat16: the same as without torch.compile."""
    dtype = torch.bfloat16
    problem = problem_of({"student": {"bias": True}}).to(dtype)
    weights = torch.randn(N, device=DEVICE)
    student = problem.student

    def loss(layer: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        sides = student.hidden @ layer, topd.Head(weight, bias), problem.teacher.hidden, problem.teacher.head()
        value = topd.linear_divergence(*sides, backend="triton")
        logprobs = topd.linear_logprobs(sides[0], sides[1], problem.tokens.unsqueeze(-1), backend="triton")
        return (value * weights).sum() + logprobs.mean()

    def gradients(of) -> list[Tensor]:
        eye = torch.eye(student.hidden.shape[1], device=DEVICE, dtype=dtype)
        leaves = [x.clone().requires_grad_() for x in (eye, student.weight, student.bias)]
        result = of(*leaves)
        result.backward()
        return [result.detach(), *(leaf.grad for leaf in leaves)]

    torch._dynamo.reset()
    compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for result, expected in zip(compiled, gradients(loss), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows(dtype):
    hidden = torch.empty(0, 8, dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.randn(VOCAB, 8, device=DEVICE).to(dtype).requires_grad_()
    head, teacher = topd.Head(weight), topd.Head(weight.detach())
    value = topd.linear_divergence(hidden, head, hidden.detach(), teacher, backend="triton")
    logprobs = topd.linear_logprobs(hidden, head, torch.empty(0, 3, dtype=torch.int64, device=DEVICE), backend="triton")
    (value.sum() + logprobs.sum()).backward()
    assert (value.shape, logprobs.shape, hidden.grad.shape) == ((0,), (0, 3), (0, 8))
    assert weight.grad.shape == weight.shape
    assert not weight.grad.any()


PRODUCTS = Products(8, 4, 2, 2, 2, weight_grad=True)


def test_a_pile_saves_traffic_until_its_tile_costs_more_rows():
    """Per row 4 (20 + 20) = 160 bytes and 2 * 20 = 40 for each gradient that waits. 1,000 bytes hold chunks of 5, 4, 3, 3, 2
    rows for piles of 1 to 5, 12 rows make 4, 4, 3, 3, 2 of them: the least of 24 / rows + 80 / (rows pile), bytes of a column,
    is the pile of 4."""
    plan = plan_chunks(12, 20, 20, workspace_bytes=1000, products=PRODUCTS)
    costs = [24 / rows + 80 / (rows * pile) for rows, pile in ((4, 1), (4, 2), (3, 3), (3, 4), (2, 5))]
    assert min(range(5), key=costs.__getitem__) == 3
    assert (plan.rows, plan.chunks, plan.pile) == (3, 4, 4)
    assert plan.workspace_bytes == 3 * (160 + 4 * 40) <= 1000


@pytest.mark.parametrize("n", [1, 2, 13, 100])
@pytest.mark.parametrize("workspace_bytes", [200, 399, 720, 5000, 10**6])
def test_piles_hold_every_row_once_within_the_workspace(n, workspace_bytes):
    plan = plan_chunks(n, 20, 20, workspace_bytes=workspace_bytes, products=PRODUCTS)
    rows = [row for pile in plan.piles() for start, stop in pile for row in range(start, stop)]
    assert rows == list(range(n))
    held = [pile[-1][1] - pile[0][0] for pile in plan.piles()]
    assert max(held) <= plan.pile * plan.rows
    assert plan.rows * 160 + plan.pile * plan.rows * 40 == plan.workspace_bytes <= workspace_bytes
    assert all(len(pile) <= plan.pile for pile in plan.piles())


def test_a_workspace_that_holds_a_row_but_not_its_gradient_is_refused():
    with pytest.raises(ValueError, match=r"at least one row, 200 bytes.*got 199"):
        plan_chunks(10, 20, 20, workspace_bytes=199, products=PRODUCTS)
    assert plan_chunks(10, 20, 20, workspace_bytes=200, products=PRODUCTS).rows == 1
    assert plan_chunks(0, 20, 20, workspace_bytes=200, products=PRODUCTS).bounds() == []


def test_where_everything_fits_there_is_one_chunk_and_no_pile():
    plan = plan_chunks(512, 1000, 1000, workspace_bytes=1 << 30, products=PRODUCTS)
    assert (plan.chunks, plan.pile) == (1, 1)
