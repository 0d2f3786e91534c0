"""What a call costs, counted in matrix products: one is 2 N H V flop. The floor is 4, or 3 with a frozen head."""

import pytest
import torch
from matrix_products import H, N, V, matrix_products

import topd


@pytest.fixture
def sides():
    torch.manual_seed(0)
    student = topd.Head(torch.nn.Parameter(torch.randn(V, H)))
    return torch.randn(N, H, requires_grad=True), student, torch.randn(N, H), topd.Head(torch.randn(V, H))


def cost(sides, backend, upstream=None, **options) -> float:
    def run():
        value = topd.linear_divergence(*sides, backend=backend, **options)
        if value.requires_grad:
            value.backward(torch.full((N,), 1.0 / N) if upstream is None else upstream)

    return matrix_products(run)


def test_a_mean_costs_the_floor(sides, chunked):
    assert cost(sides, chunked) == 4


def test_a_mean_through_autograd_costs_the_floor(sides, chunked):
    assert matrix_products(lambda: topd.linear_divergence(*sides, backend=chunked).mean().backward()) == 4


def test_a_frozen_head_saves_its_product(sides, chunked):
    hidden, student, *teacher = sides
    assert cost((hidden, student.detach(), *teacher), chunked) == 3


def test_a_frozen_head_costs_three_whatever_the_weights(sides, chunked):
    hidden, student, *teacher = sides
    assert cost((hidden, student.detach(), *teacher), chunked, upstream=torch.rand(N) + 0.1) == 3


def test_constants_cost_two(sides, chunked):
    hidden, student, *teacher = sides
    assert cost((hidden.detach(), student.detach(), *teacher), chunked) == 2
    assert matrix_products(lambda: topd.score_tokens(*sides)) == 2


def test_weights_given_as_the_hint_cost_nothing_more(sides, chunked):
    weights = torch.rand(N) + 0.1
    assert cost(sides, chunked, upstream=weights * 0.37, weights_hint=weights) == 4


def test_a_few_rows_that_deviate_cost_three_each(sides, chunked):
    upstream = torch.full((N,), 0.5)
    upstream[[3, 50, 80]] = 0.0
    assert cost(sides, chunked, upstream=upstream) == pytest.approx(4 + 3 * 3 / N)


def test_most_rows_deviating_cost_seven_at_worst(sides, chunked):
    assert cost(sides, chunked, upstream=torch.rand(N) + 0.1) <= 7


def test_masked_rows_cost_nothing(sides, chunked):
    mask = torch.arange(N) % 4 == 0
    assert cost(sides, chunked, mask=mask) == 1
    assert cost(sides, chunked, mask=torch.zeros(N, dtype=torch.bool)) == 0


def test_an_adapters_product_is_never_formed(sides, chunked):
    """Four thin products of rank 2 beside 3 full ones: logits, d logits b, and d b each take 2 N V r."""
    hidden, student, *teacher = sides
    adapter = topd.LowRank(torch.randn(2, H, requires_grad=True), torch.randn(V, 2, requires_grad=True), 0.5)
    with_adapter = topd.Head(student.weight.detach(), adapter=adapter)
    thin = 3 * 2 / H + 3 * 2 / V  # N V r and N r H products in units of N H V
    assert cost((hidden, with_adapter, *teacher), chunked) <= 3 + thin + 2 / V
