"""A hint never changes a gradient beyond rounding: rows left out of the sums, whatever their size, slope or side of a jump."""

import compare
import pytest
import torch
from compare import TENSORS, Model, Problem, by_topd, plain, random_problem
from torch import Tensor

import topd

N = 48
FULL = {"student": {"bias": True, "rank": 2}, "teacher": {"bias": True}}
HEAD = ("weight", "bias", "a", "b")


def outlier(size: float, row: int = 0) -> Tensor:
    return torch.ones(N).index_fill(0, torch.tensor([row]), size)


def assert_head(outcome: compare.Outcome, truth: compare.Outcome, tolerance: float) -> None:
    for name in HEAD:
        if truth.grads.get(name) is not None:
            compare.assert_near(outcome.grads[name], truth.grads[name], tolerance, name)


@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
def test_a_hint_of_one_row_leaves_d_bias_alone_where_hidden_states_are_zero(size, backend, device):
    """d bias does not grow with the hidden state, which is 0 in all rows but the two that adapter and weight need."""
    problem = random_problem(FULL, n=N).to(device).to(torch.float32)
    problem.student.hidden[:-2] = 0
    grad = torch.linspace(0.5, 1.5, N, device=device)
    grad[2:] = 1.0
    hint = outlier(size).to(device)
    assert_head(by_topd(problem, backend, grad, weights_hint=hint), plain(problem, grad), 3e-6)


@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("zero", [True, False], ids=["all zero", "one small"])
def test_a_hint_of_one_row_with_a_small_hidden_state_leaves_d_bias_alone(zero, size, backend, device):
    problem = random_problem(FULL, n=N).to(device).to(torch.float32)
    problem.student.hidden.mul_(0.0) if zero else problem.student.hidden[0].mul_(1e-4 / problem.student.hidden[0].norm())
    grad = torch.ones(N, device=device)
    outcome = by_topd(problem, backend, grad, weights_hint=outlier(size).to(device))
    assert_head(outcome, plain(problem, grad), 3e-6)


@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
def test_a_hint_of_one_row_leaves_the_adapter_alone(size, backend, device):
    """d b grows with h aᵀ, not with h: row 0 is seen by the adapter, the others, a thousand times larger, hardly are."""
    problem = random_problem(FULL, n=N).to(device).to(torch.float32)
    hidden, a = problem.student.hidden, problem.student.a
    a.zero_()[:, 0] = 1.0
    hidden[0], hidden[1:, 0] = 0.0, 1e-4 * hidden[1:, 0]
    hidden[0, 0] = 1e-4
    grad = torch.ones(N, device=device)
    outcome = by_topd(problem, backend, grad, trainable=("hidden", "a", "b"), weights_hint=outlier(size).to(device))
    assert_head(outcome, plain(problem, grad, trainable=("hidden", "a", "b")), 3e-6)


def test_a_steep_row_left_out_takes_no_digits_from_flat_ones(backend, device):
    """No hint: rows that are sure of one token on both sides have gradients of 1e-9, exact to float32's digits; row 5, where
    the models differ, has one of 0.3, and an upstream gradient of 0."""
    sides = []
    for _ in range(2):
        logits = torch.randn(N, 41)
        logits[torch.arange(N) != 5, 9] = 22.0
        sides.append(Model(torch.eye(N), logits.T.contiguous(), torch.zeros(41)))
    problem, grad = Problem(*sides).to(device), outlier(0.0, 5).to(device)
    outcome = by_topd(problem, backend, grad, trainable=("hidden", "weight", "bias"))
    truth = plain(problem, grad, trainable=("hidden", "weight", "bias"))
    compare.assert_near(outcome.grads["bias"], truth.grads["bias"], 2e-5, "bias")
    compare.assert_near(outcome.grads["weight"], truth.grads["weight"], 2e-5, "weight")


@pytest.mark.parametrize("divergence", [topd.TotalVariation(), topd.ForwardKL(entry_clip=0.0)], ids=repr)
def test_a_row_at_a_jump_leaves_no_residue_where_it_is_left_out(divergence, backend, device):
    """In row 0 both sides' logits are equal but for the rounding of sums over other terms in another order: p_S - p_T, and
    p_T log(p_T / p_S) - 0, have the signs of rounding errors, other ones where the row is computed again alone."""
    width, vocab = 300, 64
    student = Model(torch.randn(N, width), torch.randn(vocab, width) / width**0.5)
    order = torch.randperm(width)
    hidden = torch.cat([student.hidden[:, order], torch.zeros(N, 200)], 1)
    hidden[1:] = torch.randn(N - 1, width + 200)
    weight = torch.cat([student.weight[:, order], torch.randn(vocab, 200) / width**0.5], 1)
    problem = Problem(student, Model(hidden, weight), divergence).to(device)
    grad, hint = outlier(0.0).to(device), outlier(3.0).to(device)
    outcome = by_topd(problem, backend, grad, trainable=("hidden", "weight"), weights_hint=hint)
    truth = plain(problem, grad, trainable=("hidden", "weight"))
    compare.assert_near(outcome.grads["weight"], truth.grads["weight"], 1e-5, "weight")


def test_rows_that_are_only_added_need_no_new_start(backend, device):
    """A hint of 0 leaves a row out of the sums; what is added later was never in them."""
    problem = random_problem(FULL, topd.TotalVariation(), n=N).to(device)
    grad = torch.ones(N, device=device)
    hint = (torch.arange(N, device=device) > 4).double()
    outcome = by_topd(problem, backend, grad, weights_hint=hint)
    truth = plain(problem, grad)
    for name in TENSORS:
        compare.assert_near(outcome.grads[name], truth.grads[name], 1e-11, name)
