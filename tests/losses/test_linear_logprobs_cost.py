"""What a call of topd.linear_logprobs costs, in matrix products, and holds: the floor is 3, or 2 with a frozen head."""

import pytest
import torch
from matrix_products import H, N, V, matrix_products
from memory_watch import Largest
from torch import Tensor

import topd

M = 3


@pytest.fixture
def operands() -> tuple[Tensor, topd.Head, Tensor]:
    head = topd.Head(torch.nn.Parameter(torch.randn(V, H)))
    return torch.randn(N, H, requires_grad=True), head, torch.randint(V, (N, M))


def cost(operands, backend: str, upstream: Tensor | None = None, **options) -> float:
    def run():
        value = topd.linear_logprobs(*operands, backend=backend, **options)
        if value.requires_grad:
            value.backward(torch.full((N, M), 1.0 / N) if upstream is None else upstream)

    return matrix_products(run)


def test_a_mean_costs_the_floor(operands, chunked):
    assert cost(operands, chunked) == 3


def test_a_mean_through_autograd_costs_the_floor(operands, chunked):
    assert matrix_products(lambda: topd.linear_logprobs(*operands, backend=chunked).mean().backward()) == 3


def test_a_mean_over_unmasked_rows_costs_the_floor(operands, chunked):
    """The usual loss: a mask as the argument, and again on the value."""
    mask = torch.arange(N) % 4 != 0

    def run():
        value = topd.linear_logprobs(*operands, mask=mask, backend=chunked)
        (value.sum(-1) * mask / mask.sum()).sum().backward()

    assert matrix_products(run) == pytest.approx(3 * 3 / 4)


def test_a_cross_entropy_costs_the_floor(operands, chunked):
    hidden, head, ids = operands
    assert matrix_products(lambda: (-topd.linear_logprobs(hidden, head, ids[:, :1], backend=chunked)).mean().backward()) == 3


def test_a_frozen_head_saves_its_product(operands, chunked):
    hidden, head, ids = operands
    assert cost((hidden, head.detach(), ids), chunked) == 2
    assert cost((hidden, head.detach(), ids), chunked, upstream=torch.randn(N, M)) == 2


def test_frozen_states_save_theirs(operands, chunked):
    hidden, head, ids = operands
    assert cost((hidden.detach(), head, ids), chunked) == 2


def test_constants_cost_one(operands, chunked):
    hidden, head, ids = operands
    assert cost((hidden.detach(), head.detach(), ids), chunked) == 1
    with torch.no_grad():
        assert matrix_products(lambda: topd.linear_logprobs(*operands, return_entropy=True, backend=chunked)) == 1
        assert matrix_products(lambda: topd.topk_logprobs(*operands[:2], 4)) == 1


def test_weights_given_as_the_hint_cost_nothing_more(operands, chunked):
    """The hint is the sum over a row's upstream gradients, up to one factor."""
    weights, shares = torch.rand(N) + 0.1, torch.rand(N, M).softmax(-1)
    assert cost(operands, chunked, upstream=0.37 * weights.unsqueeze(-1) * shares, weights_hint=weights) == 3


def test_rows_of_one_sum_cost_nothing_more(operands, chunked):
    """Whatever their single entries are: only the sum reaches the dense part."""
    assert cost(operands, chunked, upstream=torch.rand(N, M).softmax(-1)) == 3


def test_rows_that_add_up_to_nothing_need_nothing_computed_again(operands, chunked):
    """A renormalised top-k."""
    upstream = torch.randn(N, M).sign() * torch.tensor([1.0, 1.0, 0.0])
    upstream[:, 1] = -upstream[:, 0]
    assert cost(operands, chunked, upstream=upstream) == 3
    assert cost(operands, chunked, upstream=upstream, weights_hint=torch.zeros(N)) == 3


def test_a_few_rows_that_deviate_cost_two_each(operands, chunked):
    upstream = torch.full((N, M), 0.5)
    upstream[[3, 50, 80]] = 0.0
    assert cost(operands, chunked, upstream=upstream) == pytest.approx(3 + 2 * 3 / N)


def test_most_rows_deviating_cost_five_at_worst(operands, chunked):
    assert cost(operands, chunked, upstream=torch.randn(N, M)) <= 5


def test_masked_rows_cost_nothing(operands, chunked):
    mask = torch.arange(N) % 4 == 0
    assert cost(operands, chunked, mask=mask) == 3 / 4
    assert cost(operands, chunked, mask=torch.zeros(N, dtype=torch.bool)) == 0


def with_entropy(operands, backend: str, *, used: Tensor) -> float:
    def run():
        logprobs, entropy = topd.linear_logprobs(*operands, return_entropy=True, backend=backend)
        (logprobs.mean() + (entropy * used).mean()).backward()

    return matrix_products(run)


def test_the_entropys_gradient_costs_three_more(operands, chunked):
    assert with_entropy(operands, chunked, used=torch.ones(N)) <= 3 + 3
    hidden, head, ids = operands
    assert with_entropy((hidden, head.detach(), ids), chunked, used=torch.ones(N)) <= 2 + 1


def test_the_entropy_costs_two_more_for_each_row_that_uses_it_and_one_for_all(operands, chunked):
    used = (torch.arange(N) % 12 == 0).float()
    assert with_entropy(operands, chunked, used=used) == pytest.approx(3 + 1 + 2 / 12)


def test_an_entropy_only_looked_at_costs_at_most_one_more(operands, chunked):
    def run():
        logprobs, entropy = topd.linear_logprobs(*operands, return_entropy=True, backend=chunked)
        logprobs.mean().backward()
        assert entropy.isfinite().all()

    assert matrix_products(run) <= 3 + 1


def test_an_adapters_product_is_never_formed(operands, chunked):
    """Thin products of rank 2 beside 2 full ones: logits, d logits b, and d b each take 2 N V r."""
    hidden, head, ids = operands
    adapter = topd.LowRank(torch.randn(2, H, requires_grad=True), torch.randn(V, 2, requires_grad=True), 0.5)
    with_adapter = topd.Head(head.weight.detach(), adapter=adapter)
    thin = 3 * 2 / H + 7 * 2 / V  # N V r and N r H products in units of N H V
    assert cost((hidden, with_adapter, ids), chunked) <= 2 + thin


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("n", [256, 2048])
def test_peak_memory_follows_the_workspace_and_not_the_rows(n, entropy, chunked):
    """The largest tensor that a call allocates, forward and backward, is no larger than its workspace."""
    vocab, width, m, workspace_bytes = 4000, 4, 3, 1 << 20
    hidden = torch.randn(n, width, requires_grad=True)
    head = topd.Head(torch.randn(vocab, width, requires_grad=True))
    ids, largest = torch.randint(vocab, (n, m)), Largest()
    with largest:
        settings = {"workspace_bytes": workspace_bytes, "return_entropy": entropy, "backend": chunked}
        value = topd.linear_logprobs(hidden, head, ids, **settings)
        logprobs, entropies = value if entropy else (value, torch.zeros(n))
        ((logprobs * torch.randn(n, m)).sum() + (entropies * torch.randn(n)).sum()).backward()
    assert hidden.grad.any()
    assert 0 < largest.nbytes <= workspace_bytes


def test_topk_holds_no_more_than_its_workspace():
    hidden, head, largest = torch.randn(2048, 4), topd.Head(torch.randn(4000, 4)), Largest()
    with largest:
        topd.topk_logprobs(hidden, head, 8, workspace_bytes=1 << 20)
    assert 0 < largest.nbytes <= 1 << 20
