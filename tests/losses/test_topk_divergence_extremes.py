"""topd.topk_divergence where the student gives the teacher's tokens no probability."""

import math

import pytest
import torch

import topd


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_without_mass_on_the_tokens_has_no_renormalised_distribution(direction, backend, device):
    """Row 0: both of the teacher's tokens are forbidden by a bias of -inf: inf, without a gradient. Row 1: one of them is, and
    the student's renormalised distribution is (1, 0) beside the teacher's (1/2, 1/2). Row 2 has no teacher's token: 0."""
    bias = torch.tensor([0.0, 0, 0, -math.inf, -math.inf], dtype=torch.float64, device=device)
    hidden = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(5, 2, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([[3, 4], [1, 3], [0, 1]], device=device)
    logprobs = torch.full((3, 2), math.log(0.4), dtype=torch.float64, device=device)
    logprobs[2] = -math.inf
    options = {"direction": direction, "support": "renormalised", "backend": backend}
    value = topd.topk_divergence(hidden, topd.Head(weight, bias), ids, logprobs, **options)
    expected = [math.inf, math.inf if direction == "forward" else math.log(2), 0.0]
    torch.testing.assert_close(value.tolist(), expected, rtol=1e-12, atol=1e-15)
    value.sum().backward()
    for grad in (hidden.grad, weight.grad):
        assert not grad.any()
