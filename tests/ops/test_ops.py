"""The registered ops: torch's own opcheck, and whole training steps through torch.compile."""

from dataclasses import replace
from typing import Any

import compare
import logprob_cases as logprobs
import pytest
import torch
import torch._inductor.config
from compare import Problem, plain, random_problem
from torch import Tensor

import topd
from topd.ops.linear_divergence import spec as divergence
from topd.ops.linear_logprobs import spec as logprob
from topd.ops.shared.engines import engine_of
from topd.ops.shared.tiles import Needs, Side
from topd.ops.topk_logprobs import op as topk

OPTIONS = {
    "plain": {},
    "everything": {
        "student": {"bias": True, "rank": 2, "softcap": 8.0, "vocab": 15},
        "teacher": {"bias": True, "rank": 2, "scale": 0.5},
        "temperature": 1.4,
        "mask": True,
        "hard_weight": 0.25,
    },
}


def side_of(model: compare.Model) -> Side:
    return Side(*(getattr(model, name) for name in compare.TENSORS), model.scaling)


def inputs_of(problem: Problem, backend: str, **changed: Any) -> divergence.Inputs:
    """The arguments of topd::linear_divergence: every gradient of the student that it can have, and scores."""
    student, teacher = problem.student, problem.teacher
    spec = divergence.RowSpec(
        student.scale,
        student.softcap,
        teacher.scale,
        teacher.softcap,
        problem.temperature,
        problem.divergence.name,
        problem.divergence.parameter,
        problem.hard_weight,
    )
    sides = side_of(student), side_of(teacher)
    call = divergence.Call(*sides, problem.mask, problem.tokens, spec, None, engine_of(backend))
    return divergence.Inputs(call, None, needs(student), keep=True, scores=True)._replace(**changed)


def needs(model: compare.Model) -> Needs:
    return Needs(True, True, model.bias is not None, model.a is not None)


def check(op: Any, arguments: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_opcheck_forward(options, chunked, device):
    problem = random_problem(options, n=6, vocab=13).to(device)
    problem = replace(problem, student=problem.student.leaves(compare.TENSORS))
    check(torch.ops.topd.linear_divergence, divergence.INPUTS.pack(inputs_of(problem, chunked)))


@pytest.mark.parametrize("uniform", [True, False], ids=["no hint", "hint"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_opcheck_backward(options, uniform, chunked, device):
    problem = random_problem(options, n=6, vocab=13).to(device)
    upstream = torch.randn(6, dtype=torch.float64, device=device)
    inputs = inputs_of(problem, chunked, weights_hint=None if uniform else upstream.abs())
    outputs = divergence.OUTPUTS.unpack(*torch.ops.topd.linear_divergence(*divergence.INPUTS.pack(inputs)))
    saved = divergence.Saved(inputs.call, outputs.kept, inputs.needs, uniform_hint=uniform)
    check(torch.ops.topd.linear_divergence_backward, (upstream, *divergence.SAVED.pack(saved)))


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", [(True, True), (False, False)], ids=["grad+scores", "value"])
def test_opcheck_rows(flags, dtype):
    problem = random_problem(OPTIONS["everything"], n=5, vocab=13).to(dtype)
    spec, products = inputs_of(problem, "cpp").call.spec, (torch.randn(5, 15, dtype=dtype), torch.randn(5, 13, dtype=dtype))
    inputs = divergence.RowsInputs(*products, problem.student.bias, problem.teacher.bias, torch.arange(5), spec, *flags)
    check(torch.ops.topd.divergence_rows, divergence.ROWS_INPUTS.pack(inputs))


class Step(torch.nn.Module):
    """A layer, its head and the weighted loss of a batch, as a training step has them."""

    def __init__(self, problem: Problem, backend: str) -> None:
        super().__init__()
        self.problem, self.backend = problem, backend
        self.layer = torch.nn.Parameter(torch.eye(problem.student.hidden.shape[-1], device=problem.student.weight.device))
        self.weight = torch.nn.Parameter(problem.student.weight.clone())
        self.bias = torch.nn.Parameter(problem.student.bias.clone())

    def forward(self, hidden: Tensor, teacher_hidden: Tensor, mask: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        head = topd.Head(self.weight, self.bias, scale=0.5)
        value = topd.linear_divergence(
            hidden @ self.layer,
            head,
            teacher_hidden,
            self.problem.teacher.head(),
            divergence=topd.JSD(0.3),
            mask=mask,
            tokens=tokens,
            hard_weight=0.1,
            backend=self.backend,
        )
        return (value * weights).sum()

    def train_on(self, loss_of, problem: Problem, weights: Tensor, steps: int = 3) -> list[Tensor]:
        """Losses, last gradients and parameters of a few steps of gradient descent."""
        losses = []
        for _ in range(steps):
            self.zero_grad()
            loss = loss_of(problem.student.hidden, problem.teacher.hidden, problem.mask, problem.tokens, weights)
            loss.backward()
            losses.append(loss.detach())
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter -= 0.01 * parameter.grad
        return [*losses, *(p.grad for p in self.parameters()), *(p.detach() for p in self.parameters())]


@pytest.mark.usefixtures("cold_compiler")
@pytest.mark.parametrize("uniform", [True, False], ids=["mean", "weights"])
def test_a_compiled_training_step_is_the_eager_one(uniform, chunked, device):
    """fullgraph, non-uniform weights of both signs with zeros, against eager and, at the first step, float64."""
    problem = random_problem({"student": {"bias": True}, "mask": True}, n=10, vocab=21).to(device).to(torch.float32)
    weights = torch.full((10,), 0.1) if uniform else torch.randn(10) * (torch.arange(10) % 4 != 0)
    weights = weights.to(device)
    eager, step = Step(problem, chunked), Step(problem, chunked)
    compiled = step.train_on(torch.compile(step, fullgraph=True), problem, weights)
    for by_compiled, expected in zip(compiled, eager.train_on(eager, problem, weights), strict=True):
        torch.testing.assert_close(by_compiled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("cold_compiler")
def test_a_compiled_gradient_is_the_true_one(chunked, device):
    """Weights that deviate from any one factor go through the compiled backward; the truth is float64."""
    problem = random_problem(OPTIONS["everything"], topd.ForwardKL(0.05), n=10, vocab=21).to(device)
    student = problem.student.leaves(compare.TENSORS)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, upstream: Tensor) -> Tensor:
        head = topd.Head(weight, bias, softcap=8.0, adapter=topd.LowRank(a, b, 0.5))
        sides = hidden, head, problem.teacher.hidden, problem.teacher.head()
        value, scores = topd.linear_divergence(
            *sides, **problem.options(), weights_hint=upstream.abs(), return_scores=True, backend=chunked
        )
        return (value * upstream).sum() + scores.student_entropy.sum()

    upstream = torch.randn(10, dtype=torch.float64, device=device)
    torch.compile(loss, fullgraph=True)(*(getattr(student, name) for name in compare.TENSORS), upstream).backward()
    for tensor, true in plain(problem, upstream).grads.items():
        compare.assert_near(getattr(student, tensor).grad, true, 1e-10, tensor)


def logprob_inputs(problem: logprobs.Problem, backend: str, **changed: Any) -> logprob.Inputs:
    """As `inputs_of`, of topd::linear_logprobs."""
    model = problem.model
    spec = logprob.LogprobSpec(model.scale, model.softcap, problem.temperature)
    engine = engine_of(backend)
    call = logprob.Call(side_of(model), problem.mask, problem.ids, spec, None, engine, padded=False, dense=True)
    return logprob.Inputs(call, None, needs(model), keep=True, entropy=problem.entropy)._replace(**changed)


LOGPROBS = ["plain", "everything"]


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("options", LOGPROBS)
def test_opcheck_logprobs_forward(options, entropy, chunked, device):
    problem = logprobs.random_problem(logprobs.OPTIONS[options], n=6, vocab=13, entropy=entropy).to(device)
    problem = replace(problem, model=problem.model.leaves(compare.TENSORS))
    check(torch.ops.topd.linear_logprobs, logprob.INPUTS.pack(logprob_inputs(problem, chunked)))


@pytest.mark.parametrize(  # each pair of settings once
    ("options", "entropy", "dense"),
    [("plain", False, True), ("plain", True, False), ("everything", False, False), ("everything", True, True)],
)
def test_opcheck_logprobs_backward(options, entropy, dense, chunked, device):
    problem = logprobs.random_problem(logprobs.OPTIONS[options], n=6, vocab=13, entropy=entropy).to(device)
    inputs = logprob_inputs(problem, chunked)
    inputs = inputs._replace(call=inputs.call._replace(dense=dense))
    outputs = logprob.OUTPUTS.unpack(*torch.ops.topd.linear_logprobs(*logprob.INPUTS.pack(inputs)))
    upstream = torch.randn_like(outputs.logprobs), torch.randn_like(outputs.entropy) if entropy else None, None
    parts = (inputs.call, outputs.logprobs, outputs.outside, outputs.kept, inputs.needs)
    saved = logprob.Saved(*parts, uniform_hint=True)
    check(torch.ops.topd.linear_logprobs_backward, (*upstream, *logprob.SAVED.pack(saved)))


@pytest.mark.parametrize("temperature", [None, 1.7], ids=["", "numbers"])
def test_opcheck_topk_logprobs(temperature, device):
    problem = logprobs.random_problem(logprobs.OPTIONS["everything"], entropy=False).to(device)
    model = problem.model
    numbers = torch.tensor([temperature], dtype=torch.float64) if temperature else None
    spec = (model.scale, model.softcap, problem.temperature)
    inputs = topk.Inputs(side_of(model), problem.mask, *spec, k=4, workspace_bytes=None, numbers=numbers)
    check(torch.ops.topd.topk_logprobs, topk.INPUTS.pack(inputs))


@pytest.mark.cpp
@pytest.mark.parametrize(("softcap", "dtype"), [(None, torch.float32), (9.0, torch.float64)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_opcheck_logprob_rows(entropy, grad, softcap, dtype):
    tile, bias, ids = torch.randn(5, 13, dtype=dtype), torch.randn(13, dtype=dtype), torch.randint(13, (5, 3))
    second = torch.empty_like(tile) if grad and entropy else None
    arguments = (tile, bias, ids, 0.5, softcap, 1.3, second, grad, entropy)
    check(torch.ops.topd.logprob_rows, arguments)


@pytest.mark.cpp
@pytest.mark.parametrize("op", ["weighted_gather", "weighted_scatter"])
def test_opcheck_weighted(op):
    """out [N, H] or [V, H], a table [V, H] or rows [N, H]."""
    ids, weights = torch.randint(13, (5, 3)), torch.randn(5, 3)
    operands = torch.zeros(5, 4), torch.randn(13, 4).bfloat16()
    if op == "weighted_scatter":
        operands = torch.zeros(13, 4), torch.randn(5, 4).bfloat16()
    check(getattr(torch.ops.topd, op), (*operands, ids, weights))


@pytest.mark.usefixtures("cold_compiler")
def test_a_compiled_step_on_log_probabilities_is_the_eager_one(chunked, device):
    """fullgraph, weights of both signs for the log-probabilities and the entropy, beside a mask."""
    options = {"bias": True, "rank": 2, "mask": True}
    problem = logprobs.random_problem(options, n=10, vocab=21).to(device).to(torch.float32)
    weights, name = problem.upstream().float(), chunked

    def loss(*tensors: Tensor) -> Tensor:
        model = replace(problem.model, **dict(zip(compare.TENSORS, tensors, strict=True)))
        value = logprobs.run(problem, replace(model, hidden=model.hidden.sin()), name)
        return (value * weights).sum()

    def trained(loss_of: Any) -> list[Tensor]:
        leaves = problem.model.leaves(compare.TENSORS)
        tensors, losses = [getattr(leaves, tensor) for tensor in compare.TENSORS], []
        for _ in range(3):
            value = loss_of(*tensors)
            grads = torch.autograd.grad(value, tensors)
            losses.append(value.detach())
            tensors = [(t - 0.01 * g).detach().requires_grad_() for t, g in zip(tensors, grads, strict=True)]
        return [*losses, *grads, *tensors]

    for by_compiled, expected in zip(trained(torch.compile(loss, fullgraph=True)), trained(loss), strict=True):
        torch.testing.assert_close(by_compiled, expected, rtol=1e-5, atol=1e-6)
