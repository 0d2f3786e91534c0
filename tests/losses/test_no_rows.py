"""No rollout (B = 0), no token (T = 0): values of the right shape, and zero gradients for hidden states and head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import topd

V, H, M = 7, 3, 2
EMPTY = pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 0)], ids=str)


class Batch:
    def __init__(self, shape: tuple[int, ...], backend: str, device: torch.device, *, mask: bool) -> None:
        def random(*size: int) -> Tensor:
            return torch.randn(*size, device=device, requires_grad=True)

        self.leaves = random(*shape, H), random(V, H), random(V), random(2, H), random(V, 2)
        self.hidden, weight, bias, a, b = self.leaves
        self.head = topd.Head(weight, bias, adapter=topd.LowRank(a, b, 0.5))
        self.teacher = torch.randn(*shape, H, device=device), topd.Head(torch.randn(V, H, device=device))
        self.ids = torch.zeros(*shape, M, dtype=torch.int64, device=device)
        self.probs, self.weights = self.ids + 0.5, torch.ones(shape, device=device)
        self.options: dict[str, Any] = {"backend": backend}
        if mask:
            self.options["mask"] = torch.ones(shape, dtype=torch.bool, device=device)


CALLS: dict[str, Callable[[Batch], Tensor]] = {
    "linear_divergence": lambda x: topd.linear_divergence(x.hidden, x.head, *x.teacher, **x.options),
    "linear_divergence, tokens and a hint": lambda x: topd.linear_divergence(
        x.hidden, x.head, *x.teacher, tokens=x.ids[..., 0], hard_weight=0.5, weights_hint=x.weights, **x.options
    ),
    "linear_logprobs": lambda x: topd.linear_logprobs(x.hidden, x.head, x.ids, weights_hint=x.weights, **x.options),
    "entropy": lambda x: topd.linear_logprobs(x.hidden, x.head, x.ids, return_entropy=True, **x.options)[1],
    "soft_target_kl": lambda x: topd.soft_target_kl(x.hidden, x.head, x.ids, x.probs, normalize=True, **x.options),
    "topk_divergence": lambda x: topd.topk_divergence(x.hidden, x.head, x.ids, x.probs.log() - 0.1, **x.options),
    "entropy_aware_opd": lambda x: topd.entropy_aware_opd(x.hidden, x.head, *x.teacher, top_k=2, **x.options),
}


@EMPTY
@pytest.mark.parametrize("mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("name", CALLS)
def test_no_rows_have_no_value_and_zero_gradients(name, mask, shape, every_backend, device):
    batch = Batch(shape, every_backend, device, mask=mask)
    value = CALLS[name](batch)
    assert value.shape[: len(shape)] == shape
    assert value.dtype == torch.float32
    value.sum().backward()
    for leaf in batch.leaves:
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@EMPTY
def test_constants_of_no_rows(shape, device):
    batch = Batch(shape, "eager", device, mask=False)
    scores = topd.score_tokens(batch.hidden, batch.head, *batch.teacher, tokens=batch.ids[..., 0])
    assert scores.reverse_kl.shape == scores.student_logprob.shape == scores.top1_agreement.shape == shape
    for part in topd.topk_logprobs(batch.hidden, batch.head, 2):
        assert part.shape == (*shape, 2)


@pytest.mark.parametrize(("m", "window"), [(0, 3), (2, 0), (0, 0)])
def test_guidance_over_no_window_or_no_position_is_zero_with_zero_gradients(m, window, backend, device):
    hidden = torch.randn(m, window, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=True)
    tokens, plan = torch.zeros(m, M, dtype=torch.int64, device=device), torch.ones(m, window, M, device=device)
    value = topd.guidance_kl(hidden, topd.Head(weight), tokens, plan, backend=backend)
    assert value.tolist() == [0.0] * m
    value.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert not weight.grad.any()
