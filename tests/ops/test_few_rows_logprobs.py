"""linear_logprobs of few rows on the CPU, where the gradient to the logits is kept for the backward pass.

The width is 7: 6 rows are few. The truth is torch's log_softmax and gather in float64.
"""

import compare
import pytest
import torch
from matrix_products import H, V, matrix_products

import topd

pytestmark = pytest.mark.cpp
ROWS, WIDTH, VOCAB, CHOSEN = 6, 7, 41, 5
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "adapter": {"rank": 3},
    "softcap and scale": {"softcap": 5.0, "scale": -0.7},
    "everything": {"bias": True, "rank": 2, "softcap": 6.0, "scale": 0.8},
}
OPTIONS = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())


def case(options, dtype=torch.float64):
    torch.manual_seed(0)
    model = compare.random_model(ROWS, VOCAB, WIDTH, **options).to(dtype)
    ids = torch.randint(VOCAB, (ROWS, CHOSEN))
    ids[1] = ids[1, 0]  # one token five times
    return model, ids, torch.linspace(-1, 2, ROWS * CHOSEN).view(ROWS, CHOSEN)


def gradients(model, compute, weights, dtype=None):
    leaves = model.leaves(compare.TENSORS, dtype)
    value = compute(leaves)
    value.backward(weights.to(value.dtype))
    return compare.Outcome(
        value.detach(), {n: getattr(leaves, n).grad for n in compare.TENSORS if getattr(leaves, n) is not None}
    )


def plain(ids):
    return lambda model: (
        (model.logits().to(torch.promote_types(model.weight.dtype, torch.float32)) / 1.3).log_softmax(-1).gather(-1, ids)
    )


def by_topd(ids, **options):
    return lambda model: topd.linear_logprobs(model.hidden, model.head(), ids, temperature=1.3, backend="cpp", **options)


@OPTIONS
def test_against_float64(options):
    model, ids, weights = case(options)
    truth = gradients(model, plain(ids), weights)
    compare.assert_outcome(gradients(model, by_topd(ids), weights), truth, 1e-11)


@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager_at_its_dtype(dtype, options):
    model, ids, weights = case(options, dtype)
    truth, yardstick = gradients(model, plain(ids), weights, torch.float64), gradients(model, plain(ids), weights)
    outcome = gradients(model, by_topd(ids), weights)
    compare.assert_no_worse(outcome.value, yardstick.value, truth.value, compare.CONSTANT, "value")
    for name, grad in outcome.grads.items():
        compare.assert_no_worse(grad, yardstick.grads[name], truth.grads[name], compare.CONSTANT, name)


@OPTIONS
def test_the_same_as_in_chunks(options):
    model, ids, weights = case(options)
    chunked = gradients(model, by_topd(ids, workspace_bytes=8 * VOCAB), weights)
    compare.assert_outcome(gradients(model, by_topd(ids), weights), chunked, 1e-12)


def test_a_certain_token_keeps_the_digits_of_its_gradient():
    """p of the token is 1 - 4e-9: its gradient of that size is exact, where p - 1 would be 0 in float32."""
    weight, hidden = torch.tensor([[20.0, 1.0], [0.0, 1.0], [0.5, -1.0]]), torch.tensor([[1.0, 0.0]])
    ids = torch.tensor([[0]])
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = weight.to(dtype, copy=True).requires_grad_()
        topd.linear_logprobs(hidden.to(dtype), topd.Head(leaf), ids, backend="cpp").sum().backward()
        grads.append(leaf.grad.double())
    assert 1e-9 < grads[1][0, 0] < 1e-8
    assert ((grads[0] - grads[1]).abs() <= 1e-5 * grads[1].abs()).all()


def test_ids_outside_a_padded_row_count_for_nothing():
    model, ids, weights = case({"bias": True})
    log_t = torch.full((ROWS, CHOSEN), -3.0).double()
    ids = torch.stack([torch.randperm(VOCAB)[:CHOSEN] for _ in range(ROWS)])
    log_t[:, 3:] = -torch.inf

    def loss(model, **options):
        return topd.topk_divergence(model.hidden, model.head(), ids, log_t, backend="cpp", **options)

    few = gradients(model, loss, weights[:, 0])
    chunked = gradients(model, lambda each: loss(each, workspace_bytes=8 * VOCAB), weights[:, 0])
    compare.assert_outcome(few, chunked, 1e-12)


@pytest.mark.parametrize("poison", [0.0, 1.0])
def test_a_row_without_a_distribution(poison):
    """Its gradient is NaN, unless nothing is asked of it."""
    model, ids, weights = case({"bias": True})
    weights[2] = poison
    model.hidden[2] = torch.nan
    outcome = gradients(model, by_topd(ids), weights)
    assert outcome.grads["weight"].isnan().any() == bool(poison)
    assert outcome.grads["bias"].isnan().any() == bool(poison)
    assert outcome.grads["hidden"][2].isnan().any() == bool(poison)


@pytest.mark.parametrize("rows", [0, 1, 5, ROWS])
def test_masks(rows):
    model, ids, weights = case({"bias": True, "rank": 2})
    mask = torch.arange(ROWS) < rows
    truth = gradients(model, plain(ids), weights * mask.unsqueeze(-1))
    outcome = gradients(model, by_topd(ids, mask=mask), weights.masked_fill(~mask.unsqueeze(-1), torch.nan))
    for name, grad in outcome.grads.items():
        compare.assert_near(grad, truth.grads[name], 1e-11, name)


def test_any_weights_cost_three_products():
    torch.manual_seed(0)
    head, hidden = topd.Head(torch.nn.Parameter(torch.randn(V, H))), torch.randn(H, H, requires_grad=True)
    ids, upstream = torch.randint(V, (H, 3)), torch.randn(H, 3)
    unit = 96 / H  # matrix_products counts in products of 96 rows
    assert matrix_products(lambda: topd.linear_logprobs(hidden, head, ids, backend="cpp").backward(upstream)) * unit == 3


def test_a_second_backward_gives_the_same_bits():
    model, ids, weights = case(HEADS["everything"], torch.float32)
    leaves = model.leaves(compare.TENSORS)
    value = by_topd(ids)(leaves)
    inputs = [getattr(leaves, name) for name in compare.TENSORS]
    first, second = (torch.autograd.grad(value, inputs, weights, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_compiled():
    """In one graph for any number of rows nothing is kept: the same gradient by the other way."""
    model, ids, _ = case(HEADS["everything"])
    leaves = model.leaves(compare.TENSORS)
    head = leaves.head()

    def loss(hidden):
        return topd.linear_logprobs(hidden, head, ids, backend="cpp").sum()

    loss(leaves.hidden).backward()
    expected = leaves.weight.grad.clone()
    leaves.weight.grad = None
    torch.compile(loss, backend="aot_eager", fullgraph=True)(leaves.hidden).backward()
    compare.assert_near(leaves.weight.grad, expected, 1e-12, "weight")
