"""The gradients of topd.linear_logprobs: exact for any upstream gradient and any hint, repeatable, once only."""

from dataclasses import replace

import compare
import pytest
import torch
from compare import TENSORS, Model, Outcome
from logprob_cases import Problem, by_topd, plain, random_problem, run
from torch import Tensor

import topd

N, M = 48, 4
FULL = {"bias": True, "rank": 2}
MASKED = FULL | {"mask": True}


def balanced() -> Tensor:
    """Rows that add up to 0, as those of a renormalised top-k; but for the first, whose ids are all one."""
    grad = torch.randn(N, M)
    grad[1:, -1] = -grad[1:, :-1].sum(-1)
    return grad


def some_rows(share: float) -> Tensor:
    return (torch.rand(N, 1) < share).float()


UPSTREAM = {
    "ones": lambda: torch.ones(N, M),
    "expanded scalar": lambda: torch.tensor(-0.3).expand(N, M),
    "one over n": lambda: torch.full((N, M), 1 / N),
    "zeros": lambda: torch.zeros(N, M),
    "all different": lambda: torch.randn(N, M),
    "random signs": lambda: torch.randn(N, M).sign(),
    "rows add up to 0": balanced,
    "rows add up to 0 exactly": lambda: torch.tensor([1.0, -1.0, 2.0, -2.0]).expand(N, M).contiguous(),
    "rows add up to 1": lambda: torch.rand(N, M).softmax(-1),
    "one id": lambda: torch.eye(M)[1].expand(N, M).contiguous(),
    "a few rows off": lambda: torch.full((N, M), 0.7) * (torch.arange(N) % 17 != 0).unsqueeze(-1),
    "a few rows on": lambda: torch.full((N, M), 0.7) * (torch.arange(N) % 7 == 0).unsqueeze(-1),
    "one large": lambda: torch.ones(N, M).index_fill(0, torch.tensor([5]), 1e6),
    "forty decades": lambda: torch.randn(N, M) * 10 ** (40 * (torch.rand(N, 1) - 0.5)),
}
ENTROPY_UPSTREAM = {
    "no entropy": None,
    "zeros": lambda: torch.zeros(N, 1),
    "ones": lambda: torch.ones(N, 1),
    "all different": lambda: torch.randn(N, 1),
    "some rows": lambda: torch.randn(N, 1) * some_rows(0.2),
}


def assert_rows(outcome: Outcome, truth: Outcome, tolerance: float) -> None:
    """As assert_outcome, and each row of the hidden gradient near its own truth, however small its upstream one."""
    compare.assert_outcome(outcome, truth, tolerance)
    for i, (row, true) in enumerate(zip(outcome.grads["hidden"], truth.grads["hidden"], strict=True)):
        compare.assert_near(row, true, tolerance, f"hidden gradient of row {i}")


def problem_of(options: dict, dtype: torch.dtype = torch.float64, *, entropy: bool = False, n: int = N) -> Problem:
    return random_problem(options, n=n, m=M, entropy=entropy).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("options", [FULL, MASKED], ids=["all", "masked"])
@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM.keys())
def test_any_upstream_gradient_is_exact(upstream, options, dtype, tolerance, backend, device):
    problem, grad = problem_of(options, dtype).to(device), upstream().to(device)
    outcome = by_topd(problem, backend, grad)
    assert_rows(outcome, plain(problem, grad), tolerance)
    assert not outcome.grads["hidden"][(grad == 0).all(-1)].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("upstream", ["ones", "zeros", "all different", "rows add up to 0"])
@pytest.mark.parametrize("of_entropy", ["zeros", "all different", "some rows"])
def test_log_probabilities_and_entropy_together(of_entropy, upstream, dtype, tolerance, backend, device):
    problem = problem_of(MASKED, dtype, entropy=True).to(device)
    grad = torch.cat([UPSTREAM[upstream](), ENTROPY_UPSTREAM[of_entropy]()], -1).to(device)
    outcome = by_topd(problem, backend, grad)
    assert_rows(outcome, plain(problem, grad), tolerance)
    assert not outcome.grads["hidden"][(grad == 0).all(-1)].any()


@pytest.mark.parametrize("used", [0, 1], ids=["log-probabilities", "entropy"])
@pytest.mark.parametrize("expanded", [True, False], ids=["sum", "weights"])
def test_one_of_the_pair_alone(expanded, used, backend, device):
    """The other's upstream gradient is then none at all, not zeros."""
    problem = problem_of(FULL, entropy=True).to(device)
    leaves = problem.model.leaves(TENSORS)
    pair = topd.linear_logprobs(leaves.hidden, leaves.head(), problem.ids, return_entropy=True, backend=backend)
    weights = torch.randn(N, device=device, dtype=torch.float64)
    weights = torch.ones_like(weights) if expanded else weights
    value = pair[used].sum() if expanded else (pair[used].reshape(N, -1) * weights.unsqueeze(-1)).sum()
    value.backward()
    grad = weights.unsqueeze(-1) * (torch.arange(M + 1, device=device) // M == used)
    for name, true in plain(problem, grad).grads.items():
        compare.assert_near(getattr(leaves, name).grad, true, 1e-11, name)


def test_a_log_probability_selected_from_many(backend, device):
    """Indexing, as a loss on one of the columns does, in a batch [B, T, M]."""
    problem = problem_of(FULL).to(device)
    leaves = problem.model.leaves(TENSORS)
    value = topd.linear_logprobs(leaves.hidden.view(6, 8, -1), leaves.head(), problem.ids.view(6, 8, M), backend=backend)
    value[:, 1:, 2].mean().backward()
    grad = torch.zeros(6, 8, M)
    grad[:, 1:, 2] = 1 / 42
    for name, true in plain(problem, grad.view(N, M).to(device)).grads.items():
        compare.assert_near(getattr(leaves, name).grad, true, 1e-7, name)


HINTS = {
    "right": lambda grad: grad,
    "right up to a factor": lambda grad: -1e-3 * grad,
    "half right": lambda grad: torch.where(torch.arange(N) % 2 == 0, grad, torch.randn(N)),
    "wrong": lambda grad: torch.randn(N),
    "zeros": lambda grad: torch.zeros(N),
    "half zeros": lambda grad: grad * (torch.arange(N) % 2),
    "one large": lambda grad: torch.ones(N).index_fill(0, torch.tensor([5]), 1e10),
    "one tiny": lambda grad: torch.ones(N).index_fill(0, torch.tensor([5]), 1e-10),
    "forty decades": lambda grad: torch.randn(N).sign() * 10 ** (40 * (torch.rand(N) - 0.5)),
    "not finite": lambda grad: torch.where(torch.arange(N) % 5 == 0, torch.tensor([torch.inf, torch.nan, 1]).repeat(16), grad),
    "all nan": lambda grad: torch.full((N,), torch.nan),
    "double": lambda grad: grad.double() * 1e100,
}


@pytest.mark.parametrize("upstream", ["a few rows off", "all different", "rows add up to 0"])
@pytest.mark.parametrize("hint", HINTS.values(), ids=HINTS.keys())
def test_a_hint_changes_no_value_and_no_gradient(hint, upstream, backend, device):
    problem, grad = problem_of(MASKED, torch.float32).to(device), UPSTREAM[upstream]()
    guess, grad = hint(grad.sum(-1)).to(device), grad.to(device)
    copy = guess.clone()
    outcome = by_topd(problem, backend, grad, weights_hint=guess)
    assert torch.equal(outcome.value, by_topd(problem, backend).value)
    assert_rows(outcome, plain(problem, grad), 3e-5)
    torch.testing.assert_close(guess, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
def test_a_hint_of_one_row_leaves_bias_and_adapter_alone_where_hidden_states_are_zero(size, backend, device):
    """d bias does not grow with the hidden state, nor d b with more of it than the adapter sees."""
    problem = problem_of(FULL, torch.float32).to(device)
    problem.model.hidden[:-2] = 0
    upstream = torch.ones(problem.upstream().shape, device=device)
    hint = torch.ones(N, device=device).index_fill(0, torch.zeros(1, dtype=torch.int64, device=device), size)
    outcome, truth = by_topd(problem, backend, upstream, weights_hint=hint), plain(problem, upstream)
    for name in TENSORS:
        compare.assert_near(outcome.grads[name], truth.grads[name], 3e-6, name)


def test_a_hint_beside_the_entropy(backend, device):
    problem = problem_of(MASKED, torch.float32, entropy=True).to(device)
    grad = problem.upstream()
    outcome = by_topd(problem, backend, grad, weights_hint=grad[:, :M].sum(-1) * 3)
    assert_rows(outcome, plain(problem, grad), 3e-5)


FROZEN = [("hidden",), ("weight",), ("bias",), ("a", "b"), ("a",), ("b",), ("hidden", "a", "b"), ("weight", "bias")]


@pytest.mark.parametrize("upstream", ["expanded scalar", "all different"])
@pytest.mark.parametrize("trainable", FROZEN, ids="+".join)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_only_what_is_trainable_has_gradients(entropy, trainable, upstream, backend, device):
    problem = problem_of(MASKED | {"softcap": 6.0}, entropy=entropy).to(device)
    grad = UPSTREAM[upstream]()
    grad = torch.cat([grad, torch.randn(N, 1)], -1).to(device) if entropy else grad.to(device)
    outcome = by_topd(problem, backend, grad, trainable=trainable)
    compare.assert_outcome(outcome, plain(problem, grad, trainable=trainable), 1e-7 if upstream == "expanded scalar" else 1e-11)


def test_hidden_rows_of_other_sizes_do_not_leak_into_the_head(backend, device):
    """A row whose hidden state is a thousand times larger is left out by its upstream gradient of 0."""
    problem = problem_of(FULL, torch.float32).to(device)
    problem.model.hidden[5] *= 1e3
    grad = torch.ones(N, M, device=device).index_fill(0, torch.tensor([5], device=device), 0.0)
    assert_rows(by_topd(problem, backend, grad), plain(problem, grad), 3e-5)


@pytest.mark.parametrize("rows", [0, 9])
def test_nothing_to_do_gives_zeros_with_zero_gradients(rows, backend, device):
    """N = 0, and an all-False mask over rows of NaN."""
    problem = random_problem(MASKED, n=rows).to(device)
    problem.model.hidden.fill_(torch.nan)
    problem = replace(problem, mask=torch.zeros_like(problem.mask), ids=torch.full_like(problem.ids, -100))
    for upstream in (problem.upstream(), torch.ones(rows, 4, device=device)):
        outcome = by_topd(problem, backend, upstream)
        assert torch.equal(outcome.value, torch.zeros(rows, 4, dtype=torch.float64, device=device))
        for name, grad in outcome.grads.items():
            assert grad is not None, name
            assert torch.equal(grad, torch.zeros_like(getattr(problem.model, name))), name


def test_an_expanded_gradient_of_no_rows_and_of_no_ids_is_zero(backend, device):
    """sum() sends an expanded scalar; nothing can be read from an empty one."""
    for n, m in ((0, 3), (5, 0), (0, 0)):
        problem = random_problem(FULL, n=n, m=m, entropy=False).to(device)
        leaves = problem.model.leaves(TENSORS)
        run(problem, leaves, backend).sum().backward()
        assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves_of(leaves))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_upstream_gradient_that_is_not_finite_propagates(bad, backend, device):
    """It spoils its own row of the hidden gradient and the head's sums, no other row."""
    problem = problem_of(FULL).to(device)
    grad, others = torch.randn(N, M, device=device), torch.arange(N, device=device) != 7
    truth = plain(problem, grad).grads["hidden"]
    grad[7, 1] = bad
    grads = by_topd(problem, backend, grad).grads
    assert not grads["hidden"][7].isfinite().any()
    compare.assert_near(grads["hidden"][others], truth[others], 1e-11, "hidden")
    for name in ("weight", "bias", "b"):
        assert not grads[name].isfinite().all(), name


def leaves_of(model: Model) -> list[Tensor]:
    return [value for name in TENSORS if (value := getattr(model, name)) is not None]


@pytest.mark.parametrize("upstream", ["ones", "expanded scalar", "a few rows off", "all different", "rows add up to 0"])
@pytest.mark.parametrize("of_entropy", ["no entropy", "all different"])
def test_backward_repeats_itself_and_writes_to_nothing_it_was_given(of_entropy, upstream, backend, device):
    """Through a retained graph: the same bits in fresh tensors, with inputs, saved tensors and upstream untouched."""
    entropy = of_entropy != "no entropy"
    problem = problem_of(MASKED, torch.float32, entropy=entropy).to(device)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    leaves = problem.model.leaves(TENSORS)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = run(problem, leaves, backend)
    grad = UPSTREAM[upstream]()
    grad = torch.cat([grad, ENTROPY_UPSTREAM[of_entropy]()], -1).to(device) if entropy else grad.to(device)
    watched = [*saved, *leaves_of(leaves), problem.mask, problem.ids, grad, value]
    before = [(tensor.detach().clone(), tensor._version) for tensor in watched]
    first, again = (torch.autograd.grad(value, leaves_of(leaves), grad, retain_graph=True) for _ in range(2))
    for tensor, (copy, version) in zip(watched, before, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)
        assert tensor._version == version
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*first, *again)]
    assert len(set(storages)) == len(storages)
    assert not set(storages) & {tensor.untyped_storage().data_ptr() for tensor in watched if tensor.numel()}


@pytest.mark.parametrize("through", TENSORS)
@pytest.mark.parametrize("to", ["hidden", "weight"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_a_second_derivative_is_refused_in_words(entropy, to, through, backend, device):
    """Never a silent zero: any gradient differentiated again raises, and names the function."""
    problem = problem_of(FULL, n=5, entropy=entropy).to(device)
    leaves = problem.model.leaves(TENSORS)
    value = run(problem, leaves, backend)
    (first,) = torch.autograd.grad(value.square().sum(), getattr(leaves, through), create_graph=True)
    with pytest.raises(RuntimeError, match=r"topd\.linear_logprobs has no second derivative"):
        torch.autograd.grad(first.square().sum(), getattr(leaves, to))


@pytest.mark.parametrize("options", [FULL | {"temperature": 1.3}, MASKED | {"softcap": 4.0}], ids=["all", "masked"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_gradcheck(entropy, options, chunked, device):
    """Finite differences in float64, to hidden states, weight, bias and adapter."""
    problem = random_problem(options, n=4, m=3, vocab=6, entropy=entropy).to(device)
    problem.model.hidden.mul_(0.3)
    leaves = problem.model.leaves(TENSORS)

    def value(*tensors: Tensor) -> Tensor:
        return run(problem, replace(leaves, **dict(zip(TENSORS, tensors, strict=True))), chunked)

    assert torch.autograd.gradcheck(value, leaves_of(leaves))
