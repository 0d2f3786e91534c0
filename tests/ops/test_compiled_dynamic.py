"""torch.compile(fullgraph=True, dynamic=True): one graph for every number of rows, temperature, hard weight and parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import topd

pytestmark = pytest.mark.usefixtures("cold_compiler")
V, H, M = 11, 5, 3
# More values than torch compiles one function for (eight): were any of them a constant of the graph, this would raise.
TEMPERATURES = [1.3, 1.0, 0.7, 2.5, 0.9, 1.7, 3.1, 0.6, 1.1, 2.2]


class Batch:
    """n rows of both models, ids, a mask and target probabilities; heads that are shared by all batches."""

    def __init__(self, n: int, leaves: list[Tensor]) -> None:
        self.leaves = leaves
        self.hidden = torch.randn(n, H, requires_grad=True)
        self.teacher_hidden, self.ids = torch.randn(n, H), torch.rand(n, V).argsort(-1)[:, :M]
        self.probs, self.mask = torch.rand(n, M).softmax(-1), torch.arange(n) % 3 != 1

    def gradients(self, loss: Callable[..., Tensor], temperature: float) -> list[Tensor]:
        inputs = [self.hidden, *self.leaves]
        value = loss(*inputs, self.teacher_hidden, self.ids, self.probs, self.mask, temperature)
        weights = torch.linspace(-1, 2, value.numel()).view(value.shape)
        return [value.detach(), *torch.autograd.grad((value * weights).sum(), inputs)]


TEACHER = torch.randn(V, H, generator=torch.Generator().manual_seed(1))


def of_log_probabilities(h: Tensor, head: topd.Head, i: Tensor, m: Tensor, x: float, options: dict[str, Any]) -> Tensor:
    logprobs, entropy = topd.linear_logprobs(h, head, i, temperature=x, mask=m, return_entropy=True, **options)
    return logprobs.sum(-1) + entropy


LOSSES: dict[str, Callable[..., Tensor]] = {
    "linear_divergence": lambda h, head, t, i, q, m, x, o: topd.linear_divergence(
        h, head, t, topd.Head(TEACHER), temperature=x, mask=m, **o
    ),
    "weights and parameters": lambda h, head, t, i, q, m, x, o: topd.linear_divergence(
        h, head, t, topd.Head(TEACHER), divergence=topd.JSD(x / 4), tokens=i[:, 0], hard_weight=x / 3, temperature=x, **o
    ),
    "entry clip": lambda h, head, t, i, q, m, x, o: topd.linear_divergence(
        h, head, t, topd.Head(TEACHER), divergence=topd.ForwardKL(x / 20), weights_hint=q[:, 0], **o
    ),
    "linear_logprobs": lambda h, head, t, i, q, m, x, o: of_log_probabilities(h, head, i, m, x, o),
    "score_tokens": lambda h, head, t, i, q, m, x, o: (
        topd.score_tokens(h, head, t, topd.Head(TEACHER), temperature=x, mask=m).reverse_kl
        + topd.linear_logprobs(h, head, i[:, :1], temperature=x, **o)[:, 0]
    ),
    "soft_target_kl": lambda h, head, t, i, q, m, x, o: topd.soft_target_kl(h, head, i, q, temperature=x, mask=m, **o),
    "topk_divergence": lambda h, head, t, i, q, m, x, o: topd.topk_divergence(
        h, head, i, q.log() - 0.1, temperature=x, mask=m, **o
    ),
    "entropy_aware_opd": lambda h, head, t, i, q, m, x, o: topd.entropy_aware_opd(
        h, head, t, topd.Head(TEACHER), top_k=4, entropy_threshold=x / 2, coef=x, temperature=x, mask=m, **o
    ),
    "guidance_kl": lambda h, head, t, i, q, m, x, o: topd.guidance_kl(
        h.unsqueeze(0), head, i[:1], q.unsqueeze(0), temperature=x, **o
    ),
}


def leaves() -> list[Tensor]:
    shapes = (V, H), (V,), (2, H), (V, 2)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def losses(name: str, backend: str | None) -> Callable[..., Tensor]:
    def loss(h: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        head = topd.Head(weight, bias, adapter=topd.LowRank(a, b, 0.5))
        return LOSSES[name](h.sin(), head, *rest, {"backend": backend})

    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_rows_and_temperatures_change_in_one_graph(name):
    """Values and gradients are eager's."""
    loss, counter, shared = losses(name, None), CompileCounterWithBackend("aot_eager"), leaves()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for n, temperature in enumerate(TEMPERATURES, 4):
        batch = Batch(n, shared)
        gradients, expected = batch.gradients(compiled, temperature), batch.gradients(loss, temperature)
        for each, true in zip(gradients, expected, strict=True):
            torch.testing.assert_close(each, true, rtol=1e-5, atol=1e-6)
        frames.append(counter.frame_count)
    assert frames[-1] == frames[1]


@pytest.mark.parametrize(
    ("dynamic", "backend", "compiler"),
    [
        pytest.param(True, None, "inductor", marks=pytest.mark.slow),
        pytest.param(None, None, "inductor", marks=pytest.mark.slow),
        (True, "eager", "aot_eager"),
    ],
)
def test_a_changing_temperature_on_every_backend(dynamic, backend, compiler):
    loss, shared = losses("linear_divergence", backend), leaves()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
    for n, temperature in enumerate(TEMPERATURES[:3], 4):
        batch = Batch(n, shared)
        for each, true in zip(batch.gradients(compiled, temperature), batch.gradients(loss, temperature), strict=True):
            torch.testing.assert_close(each, true, rtol=1e-5, atol=1e-6)


def test_a_temperature_that_is_wrong_is_refused_in_a_compiled_region():
    loss = torch.compile(losses("linear_divergence", None), dynamic=True, backend="aot_eager")
    batch = Batch(4, leaves())
    batch.gradients(loss, 1.5)
    for wrong in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(Exception, match="temperature"):
            batch.gradients(loss, wrong)
