"""backend="triton" on float16 models: what float16's range would lose is kept by powers of two, and no number leaves it."""

import compare
import pytest
import torch
from compare import by_topd
from torch import Tensor
from triton_cases import DEVICE, NEEDS_TRITON, logprob_outcome

import topd

pytestmark = NEEDS_TRITON


def relative(result: Tensor, true: Tensor) -> float:
    return ((result.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_float16_keeps_small_dlogits(divergence):
    """Nearly equal heads over many entries: most dlogits are below 2^-24. Piles of chunks, an adapter, a row that deviates from
    the hint."""
    vocab, rows = 8009, 5
    hidden, a = torch.randn(rows, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    weight, b = torch.randn(vocab, 8, device=DEVICE) / 2, torch.randn(vocab, 2, device=DEVICE) / 10
    near = weight + 1e-3 * torch.randn(vocab, 8, device=DEVICE) + 0.5 * (b @ a)
    upstream = 2.0**12 * torch.tensor([1.0, 1, -0.3, 1, 1], device=DEVICE)
    grads = []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = [x.half().to(dtype).requires_grad_() for x in (hidden, weight, a, b)]
        student = topd.Head(leaves[1], adapter=topd.LowRank(leaves[2], leaves[3], 0.5))
        teacher = topd.Head(near.half().to(dtype))
        options = {"divergence": divergence, "workspace_bytes": 24 * 8016 if backend == "triton" else None}
        value = topd.linear_divergence(leaves[0], student, leaves[0].detach(), teacher, backend=backend, **options)
        value.backward(upstream.to(value.dtype))
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        assert relative(one, other) < 2e-3


def test_float16_keeps_small_probabilities():
    """The entropy's gradient beside a token that is nearly certain: the others, 1e-8 each, alone know seven of the features."""
    vocab, rows = 2003, 3
    hidden, weight = torch.randn(rows, 8, device=DEVICE) / 10, torch.randn(vocab, 8, device=DEVICE)
    hidden[:, 0], weight[:, 0], weight[0] = 1, 0, torch.eye(8, device=DEVICE)[0] * 18
    ids = torch.randint(1, vocab, (rows, 2), device=DEVICE)
    upstream = [torch.zeros(rows, 2, device=DEVICE), 2.0**10 * torch.randn(rows, device=DEVICE)]
    model = compare.Model(hidden.half(), weight.half())
    result, true = (
        logprob_outcome(model, ids, name, upstream, dtype).grads["hidden"][:, 1:]
        for name, dtype in (("triton", torch.float16), ("reference", torch.float64))
    )
    assert relative(result, true) < 2e-3


def test_float16_holds_what_a_reverse_kl_may_reach():
    """A KL of 1,000: the gradient to a logit, 500, is held at 255.9, and is no infinity."""
    hidden = torch.ones(1, 1, device=DEVICE, dtype=torch.float16, requires_grad=True)
    student, teacher = (topd.Head(torch.tensor([[x], [0.0]], device=DEVICE, dtype=torch.float16)) for x in (2.0**-10, -2000.0))
    topd.linear_divergence(hidden, student, hidden.detach(), teacher, backend="triton").sum().backward()
    assert hidden.grad.item() == pytest.approx(65504 / 256 * 2**-10, rel=1e-3)


def test_float16_under_a_gradient_scaler():
    """Upstream gradients of 65,536 and rows that deviate from the hint; the gradient itself is in float16's range."""
    hidden, weight = 3 * torch.randn(6, 8, device=DEVICE), torch.randn(19, 8, device=DEVICE)
    student = compare.Model(hidden.half(), weight.half())
    teacher = compare.Model(hidden.half(), (weight + 0.003 * torch.randn(19, 8, device=DEVICE)).half())
    upstream = 2.0**16 * torch.randn(6, device=DEVICE)
    problem = compare.Problem(student, teacher, topd.ForwardKL())
    result = by_topd(problem, "triton", upstream)
    true = by_topd(problem.to(torch.float64), "reference", upstream.double())
    assert 100 < true.grads["weight"].abs().max() < 1000
    compare.assert_near(result.grads["weight"].double(), true.grads["weight"], 2**-9, "gradient of weight")


def test_float16_under_small_upstream_gradients():
    """As under a mean over many tokens: each row's part is below float16's least number, their sum is not."""
    states = torch.tensor([0.4, -0.5, 0.3, -0.2], device=DEVICE).repeat(16, 1)
    weight = torch.randn(9, 4, device=DEVICE)
    weight[7] = 40 * states[0]  # this token is certain, and not chosen: outside its id lies all of the mass
    ids = torch.full((16, 1), 3, device=DEVICE)
    upstream = [(2.0**-24 * torch.linspace(0.5, 1, 16, device=DEVICE)).unsqueeze(-1)]
    model = compare.Model(states.half(), weight.half())
    result, true = (
        logprob_outcome(model, ids, name, upstream, dtype).grads["weight"].double()
        for name, dtype in (("triton", torch.float16), ("reference", torch.float64))
    )
    assert true[7].abs().max() > 2**-22
    assert ((result - true).abs() <= 2**-24).all()
