"""The gradients of topd.linear_divergence: exact for any upstream gradient and any hint, repeatable, once only."""

from dataclasses import replace

import compare
import pytest
import torch
from compare import DIVERGENCES, TENSORS, Outcome, Problem, by_topd, plain, random_problem
from torch import Tensor

import topd

N = 48
FULL = {"student": {"bias": True, "rank": 2}, "teacher": {"bias": True}, "hard_weight": 0.3}
MASKED = FULL | {"mask": True}


def one_hot() -> Tensor:
    return torch.eye(N)[N // 2]


def outlier(size: float) -> Tensor:
    return torch.ones(N).index_fill(0, torch.tensor([5]), size)


def spread(decades: float) -> Tensor:
    return torch.randn(N).sign() * 10 ** (decades * (torch.rand(N) - 0.5))


UPSTREAM = {
    "ones": lambda: torch.ones(N),
    "expanded scalar": lambda: torch.tensor(-0.3).expand(N),
    "one over n": lambda: torch.full((N,), 1 / N),
    "zeros": lambda: torch.zeros(N),
    "random signs": lambda: torch.randn(N).sign(),
    "one hot": one_hot,
    "3 % zeros": lambda: torch.full((N,), 0.7) * (torch.arange(N) % 33 != 0),
    "mostly zeros": lambda: torch.full((N,), 0.7) * (torch.arange(N) % 7 == 0),
    "all different": lambda: torch.randn(N),
    "one large": lambda: outlier(1e6),
    "one tiny": lambda: outlier(1e-6),
    "forty decades": lambda: spread(40),
}


def assert_rows(outcome: Outcome, truth: Outcome, tolerance: float) -> None:
    """As assert_outcome, and each row of the hidden gradient near its own truth, however small its upstream one."""
    compare.assert_outcome(outcome, truth, tolerance)
    for i, (row, true) in enumerate(zip(outcome.grads["hidden"], truth.grads["hidden"], strict=True)):
        compare.assert_near(row, true, tolerance, f"hidden gradient of row {i}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("options", [FULL, MASKED], ids=["all", "masked"])
@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM.keys())
def test_any_upstream_gradient_is_exact(upstream, options, dtype, tolerance, backend, device):
    problem = random_problem(options, n=N).to(device).to(dtype)
    grad = upstream().to(device)
    outcome, truth = by_topd(problem, backend, grad), plain(problem, grad)
    assert_rows(outcome, truth, tolerance)
    assert not outcome.grads["hidden"][grad == 0].any()


def test_hidden_rows_of_other_sizes_do_not_leak_into_the_head(backend, device):
    """A row whose hidden state is a thousand times larger is left out by its upstream gradient of 0."""
    problem = random_problem(FULL, topd.ForwardKL(), n=N).to(device).to(torch.float32)
    problem.student.hidden[5] *= 1e3
    grad = outlier(0.0).to(device)
    assert_rows(by_topd(problem, backend, grad), plain(problem, grad), 3e-5)


HINTS = {
    "right": lambda grad: grad,
    "right up to a factor": lambda grad: -1e-3 * grad,
    "half right": lambda grad: torch.where(torch.arange(N) % 2 == 0, grad, torch.randn(N)),
    "wrong": lambda grad: torch.randn(N),
    "zeros": lambda grad: torch.zeros(N),
    "half zeros": lambda grad: grad * (torch.arange(N) % 2),
    "negative": lambda grad: -torch.rand(N),
    "one large": lambda grad: outlier(1e10),
    "one tiny": lambda grad: outlier(1e-10),
    "forty decades": lambda grad: spread(40),
    "not finite": lambda grad: torch.where(torch.arange(N) % 5 == 0, torch.tensor([torch.inf, torch.nan, 1]).repeat(16), grad),
    "all nan": lambda grad: torch.full((N,), torch.nan),
    "double": lambda grad: grad.double() * 1e100,
}


@pytest.mark.parametrize("upstream", ["ones", "3 % zeros", "all different"])
@pytest.mark.parametrize("hint", HINTS.values(), ids=HINTS.keys())
def test_a_hint_changes_no_value_and_no_gradient(hint, upstream, backend, device):
    problem = random_problem(MASKED, n=N).to(device).to(torch.float32)
    grad = UPSTREAM[upstream]()
    guess, grad = hint(grad).to(device), grad.to(device)
    copy = guess.clone()
    outcome = by_topd(problem, backend, grad, weights_hint=guess)
    assert torch.equal(outcome.value, by_topd(problem, backend).value)
    assert_rows(outcome, plain(problem, grad), 3e-5)
    torch.testing.assert_close(guess, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("divergence", [topd.ForwardKL(), topd.ReverseKL()], ids=repr)
def test_infinite_rows_masked_out_afterwards_leave_clean_gradients(divergence, backend, device):
    """Every third row pairs a probability of 0 with one above 0; torch.where on the value keeps it out."""
    problem = random_problem({}, divergence, n=9).to(device)
    forbidden = problem.student.hidden.new_zeros(41)
    forbidden[3] = -torch.inf
    one_sided = "student" if divergence == topd.ForwardKL() else "teacher"
    cut = replace(problem, **{one_sided: replace(getattr(problem, one_sided), bias=forbidden)})
    student = cut.student.leaves(("hidden", "weight"))
    sides = student.hidden, student.head(), cut.teacher.hidden, cut.teacher.head()
    infinite = topd.linear_divergence(*sides, divergence=divergence, backend=backend)
    finite = topd.linear_divergence(*sides, divergence="jsd", backend=backend)
    assert infinite.isinf().all()
    torch.where(infinite.isinf(), finite, infinite).sum().backward()
    truth = by_topd(replace(cut, divergence=topd.JSD()), backend, torch.ones(9, device=device), trainable=("hidden", "weight"))
    for name in ("hidden", "weight"):
        compare.assert_near(getattr(student, name).grad, truth.grads[name], 1e-12, name)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_and_have_no_upstream_gradient_leave_clean_gradients(side, bad, backend, device):
    problem = random_problem(FULL, n=N).to(device)
    clean = replace(problem, mask=torch.arange(N, device=device) % 11 != 4)
    getattr(problem, side).hidden[4::11] = bad
    for grad in (torch.ones(N), torch.randn(N)):
        grad = grad.to(device) * clean.mask
        outcome, truth = by_topd(problem, backend, grad), plain(clean, grad)
        assert outcome.value[4::11].isnan().all()
        assert_rows(replace(outcome, value=truth.value), truth, 1e-11)


@pytest.mark.parametrize("upstream", ["ones", "expanded scalar", "all different"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_that_are_not_finite_and_have_an_upstream_gradient_propagate(side, upstream, backend, device):
    """To their own row of the hidden gradient and to the head's: a broken batch is not trained on in silence."""
    problem = random_problem(FULL, n=N).to(device)
    getattr(problem, side).hidden[4] = torch.nan
    grads = by_topd(problem, backend, UPSTREAM[upstream]().to(device)).grads
    assert grads["hidden"][4].isnan().all()
    assert grads["hidden"][torch.arange(N, device=device) != 4].isfinite().all()
    for name in ("weight", "bias", "b"):
        assert grads[name].isnan().all(), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_upstream_gradient_that_is_not_finite_propagates(bad, backend, device):
    """It spoils its own row of the hidden gradient and the head's sums, no other row."""
    problem = random_problem(FULL, n=N).to(device)
    grad, others = torch.randn(N, device=device), torch.arange(N, device=device) != 7
    truth = plain(problem, grad).grads["hidden"]
    grad[7] = bad
    grads = by_topd(problem, backend, grad).grads
    assert not grads["hidden"][7].isfinite().any()
    compare.assert_near(grads["hidden"][others], truth[others], 1e-11, "hidden")
    for name in ("weight", "bias", "b"):
        assert not grads[name].isfinite().all(), name


def graph_of(problem: Problem, backend: str) -> tuple[compare.Model, Tensor]:
    student = problem.student.leaves(TENSORS)
    sides = student.hidden, student.head(), problem.teacher.hidden, problem.teacher.head()
    return student, topd.linear_divergence(*sides, **problem.options(), backend=backend)


def leaves_of(student: compare.Model) -> list[Tensor]:
    return [value for name in TENSORS if (value := getattr(student, name)) is not None]


@pytest.mark.parametrize("upstream", ["ones", "expanded scalar", "3 % zeros", "all different"])
def test_backward_repeats_itself_and_writes_to_nothing_it_was_given(upstream, backend, device):
    """Through a retained graph: the same bits in fresh tensors, with inputs, saved tensors and upstream untouched."""
    problem = random_problem(MASKED, n=N).to(device).to(torch.float32)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        student, value = graph_of(problem, backend)
    grad = UPSTREAM[upstream]().to(device)
    teacher = [tensor for name in TENSORS if (tensor := getattr(problem.teacher, name)) is not None]
    watched = [*saved, *leaves_of(student), *teacher, problem.mask, problem.tokens, grad, value]
    before = [(tensor.detach().clone(), tensor._version) for tensor in watched]
    first, again = (torch.autograd.grad(value, leaves_of(student), grad, retain_graph=True) for _ in range(2))
    for tensor, (copy, version) in zip(watched, before, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)
        assert tensor._version == version
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*first, *again)]
    assert len(set(storages)) == len(storages)
    assert not set(storages) & {tensor.untyped_storage().data_ptr() for tensor in watched if tensor.numel()}


@pytest.mark.parametrize("through", ["hidden", "weight", "bias", "a", "b"])
@pytest.mark.parametrize("to", ["hidden", "weight"])
def test_a_second_derivative_is_refused_in_words(to, through, backend, device):
    """Never a silent zero: any gradient differentiated again raises."""
    student, value = graph_of(random_problem(FULL, n=5).to(device), backend)
    (first,) = torch.autograd.grad(value.sum(), getattr(student, through), create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative|differentiate twice"):
        torch.autograd.grad(first.square().sum(), getattr(student, to))


@pytest.mark.parametrize("options", [FULL | {"temperature": 1.3}, MASKED], ids=["all", "masked"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_gradcheck(divergence, options, chunked, device):
    """Finite differences in float64, to hidden states, weight, bias and adapter. The reference is autograd's own."""
    problem = random_problem(options, divergence, n=4, vocab=6).to(device)
    problem.student.hidden.mul_(0.3)
    student = problem.student.leaves(TENSORS)
    sides = problem.teacher.hidden, problem.teacher.head()

    def value(*leaves: Tensor) -> Tensor:
        model = replace(student, **dict(zip(TENSORS, leaves, strict=True)))
        return topd.linear_divergence(model.hidden, model.head(), *sides, **problem.options(), backend=chunked)

    assert torch.autograd.gradcheck(value, leaves_of(student))
