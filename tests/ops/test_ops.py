"""The registered ops: torch's own opcheck, and whole training steps through torch.compile."""

from dataclasses import replace
from typing import Any

import compare
import pytest
import test_linear_logprobs as logprobs
import torch
import torch._inductor.config
from compare import Problem, plain, random_problem
from torch import Tensor

import topd

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


def pack(op: Any, known: dict[str, Any]) -> tuple[Any, ...]:
    """Return an op's arguments by the names in its schema; one that is not known has its default, an optional one None."""
    arguments = op._schema.arguments
    missing = [a.name for a in arguments if not (a.name in known or a.has_default_value() or "Optional" in str(a.type))]
    assert not missing, f"the schema of {op} has new arguments: {missing}"
    return tuple(known.get(argument.name, argument.default_value) for argument in arguments)


def known_arguments(problem: Problem, backend: str) -> dict[str, Any]:
    known: dict[str, Any] = {"mask": problem.mask, "tokens": problem.tokens, "backend": backend}
    for side in ("student", "teacher"):
        model = getattr(problem, side)
        known |= {f"{side}_{name}": getattr(model, name) for name in (*compare.TENSORS, "scaling", "scale", "softcap")}
    names = ("hidden_grad", "weight_grad", "bias_grad", "adapter_grad", "keep", "scores")
    return (
        known
        | dict.fromkeys(names, True)
        | {
            "temperature": problem.temperature,
            "divergence": problem.divergence.name,
            "parameter": problem.divergence.parameter,
            "hard_weight": problem.hard_weight,
        }
    )


def chunked(backend: str) -> str:
    if backend == "reference":
        pytest.skip("the reference is not an op")
    return backend


def needs(problem: Problem) -> dict[str, bool]:
    return {"bias_grad": problem.student.bias is not None, "adapter_grad": problem.student.a is not None}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_opcheck_forward(options, backend, device):
    problem = random_problem(options, n=6, vocab=13).to(device)
    problem = replace(problem, student=problem.student.leaves(compare.TENSORS))
    op = torch.ops.topd.linear_divergence.default
    known = known_arguments(problem, chunked(backend)) | needs(problem)
    results = torch.library.opcheck(op, pack(op, known))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("uniform", [True, False], ids=["no hint", "hint"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_opcheck_backward(options, uniform, backend, device):
    """Its arguments: the upstream gradient, what both ops share, what forward kept, whether no hint came, flags."""
    problem = random_problem(options, n=6, vocab=13).to(device)
    upstream = torch.randn(6, dtype=torch.float64, device=device)
    forward = torch.ops.topd.linear_divergence.default
    known = known_arguments(problem, chunked(backend)) | needs(problem)
    given = pack(forward, known if uniform else known | {"weights_hint": upstream.abs()})
    shared = [argument.name for argument in forward._schema.arguments].index("weights_hint")
    flags = (True, True, *needs(problem).values())
    _, _, *kept = forward(*given)
    arguments = (upstream, *given[:shared], *kept, uniform, *flags)
    results = torch.library.opcheck(torch.ops.topd.linear_divergence_backward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.skipif(not topd.backends()["cpp"], reason=str(topd.backends()["cpp"]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", [(True, True), (False, False)], ids=["grad+scores", "value"])
def test_opcheck_rows(flags, dtype):
    op = torch.ops.topd.divergence_rows.default
    known = known_arguments(random_problem(OPTIONS["everything"], n=5, vocab=13).to(dtype), "cpp")
    known |= {"student_product": torch.randn(5, 15, dtype=dtype), "teacher_product": torch.randn(5, 13, dtype=dtype)}
    known |= {"tokens": torch.arange(5), "grad": flags[0], "scores": flags[1]}
    results = torch.library.opcheck(op, pack(op, known))
    assert set(results.values()) == {"SUCCESS"}


@pytest.fixture
def cold_compiler():
    """Nothing compiled before, here or in an earlier run, may stand in for compiling now."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


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
def test_a_compiled_training_step_is_the_eager_one(uniform, backend, device):
    """fullgraph, non-uniform weights of both signs with zeros, against eager and, at the first step, float64."""
    problem = random_problem({"student": {"bias": True}, "mask": True}, n=10, vocab=21).to(device).to(torch.float32)
    weights = torch.full((10,), 0.1) if uniform else torch.randn(10) * (torch.arange(10) % 4 != 0)
    weights = weights.to(device)
    eager, step = Step(problem, chunked(backend)), Step(problem, backend)
    compiled = step.train_on(torch.compile(step, fullgraph=True), problem, weights)
    for found, expected in zip(compiled, eager.train_on(eager, problem, weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("cold_compiler")
def test_a_compiled_gradient_is_the_true_one(backend, device):
    """Weights that deviate from any one factor go through the compiled backward; the truth is float64."""
    problem = random_problem(OPTIONS["everything"], topd.ForwardKL(0.05), n=10, vocab=21).to(device)
    student, name = problem.student.leaves(compare.TENSORS), chunked(backend)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, upstream: Tensor) -> Tensor:
        head = topd.Head(weight, bias, softcap=8.0, adapter=topd.LowRank(a, b, 0.5))
        sides = hidden, head, problem.teacher.hidden, problem.teacher.head()
        value, scores = topd.linear_divergence(
            *sides, **problem.options(), weights_hint=upstream.abs(), return_scores=True, backend=name
        )
        return (value * upstream).sum() + scores.student_entropy.sum()

    upstream = torch.randn(10, dtype=torch.float64, device=device)
    torch.compile(loss, fullgraph=True)(*(getattr(student, name) for name in compare.TENSORS), upstream).backward()
    for tensor, true in plain(problem, upstream).grads.items():
        compare.assert_near(getattr(student, tensor).grad, true, 1e-10, tensor)


def logprob_arguments(problem: logprobs.Problem, backend: str) -> dict[str, Any]:
    model = problem.model
    known = {name: getattr(model, name) for name in (*compare.TENSORS, "scaling", "scale", "softcap")}
    flags = {"hidden_grad": True, "weight_grad": True, "bias_grad": model.bias is not None, "adapter_grad": model.a is not None}
    settings = {"mask": problem.mask, "ids": problem.ids, "temperature": problem.temperature, "backend": backend}
    return known | flags | settings | {"padded": False, "dense": True, "keep": True, "entropy": problem.entropy}


LOGPROBS = ["plain", "everything"]


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("options", LOGPROBS)
def test_opcheck_logprobs_forward(options, entropy, backend, device):
    problem = logprobs.random_problem(logprobs.OPTIONS[options], n=6, vocab=13, entropy=entropy).to(device)
    problem = replace(problem, model=problem.model.leaves(compare.TENSORS))
    op = torch.ops.topd.linear_logprobs.default
    results = torch.library.opcheck(op, pack(op, logprob_arguments(problem, chunked(backend))))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "later"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("options", LOGPROBS)
def test_opcheck_logprobs_backward(options, entropy, dense, backend, device):
    """Its arguments: three upstream gradients, what both ops share, what forward returned but for the entropy, flags."""
    problem = logprobs.random_problem(logprobs.OPTIONS[options], n=6, vocab=13, entropy=entropy).to(device)
    forward = torch.ops.topd.linear_logprobs.default
    known = logprob_arguments(problem, chunked(backend)) | {"dense": dense}
    given, names = pack(forward, known), [argument.name for argument in forward._schema.arguments]
    found, entropies, outside, *kept = forward(*given)
    upstream = torch.randn_like(found), torch.randn_like(entropies) if entropy else None, None
    flags = [known[name] for name in ("hidden_grad", "weight_grad", "bias_grad", "adapter_grad")]
    arguments = (*upstream, *given[: names.index("weights_hint")], found, outside, *kept, True, *flags)
    results = torch.library.opcheck(torch.ops.topd.linear_logprobs_backward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


needs_cpp = pytest.mark.skipif(not topd.backends()["cpp"], reason=str(topd.backends()["cpp"]))


@pytest.mark.parametrize("temperature", [None, 1.7], ids=["", "numbers"])
def test_opcheck_topk_logprobs(temperature, device):
    problem = logprobs.random_problem(logprobs.OPTIONS["everything"], entropy=False).to(device)
    model, op = problem.model, torch.ops.topd.topk_logprobs.default
    known = {name: getattr(model, name) for name in (*compare.TENSORS, "scaling", "scale", "softcap")}
    known |= {"mask": problem.mask, "temperature": problem.temperature, "k": 4}
    if temperature:
        known["numbers"] = torch.tensor([temperature], dtype=torch.float64)
    results = torch.library.opcheck(op, pack(op, known))
    assert set(results.values()) == {"SUCCESS"}


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 9.0])
@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_opcheck_logprob_rows(flags, softcap, dtype):
    grad, entropy = flags
    tile, bias, ids = torch.randn(5, 13, dtype=dtype), torch.randn(13, dtype=dtype), torch.randint(13, (5, 3))
    second = torch.empty_like(tile) if grad and entropy else None
    arguments = (tile, bias, ids, 0.5, softcap, 1.3, second, grad, entropy)
    results = torch.library.opcheck(torch.ops.topd.logprob_rows.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@needs_cpp
@pytest.mark.parametrize("op", ["weighted_gather", "weighted_scatter"])
def test_opcheck_weighted(op):
    """out [N, H] or [V, H], a table [V, H] or rows [N, H]."""
    ids, weights = torch.randint(13, (5, 3)), torch.randn(5, 3)
    operands = torch.zeros(5, 4), torch.randn(13, 4).bfloat16()
    if op == "weighted_scatter":
        operands = torch.zeros(13, 4), torch.randn(5, 4).bfloat16()
    results = torch.library.opcheck(getattr(torch.ops.topd, op).default, (*operands, ids, weights))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.usefixtures("cold_compiler")
def test_a_compiled_step_on_log_probabilities_is_the_eager_one(backend, device):
    """fullgraph, weights of both signs for the log-probabilities and the entropy, beside a mask."""
    options = {"bias": True, "rank": 2, "mask": True}
    problem = logprobs.random_problem(options, n=10, vocab=21).to(device).to(torch.float32)
    weights, name = problem.upstream().float(), chunked(backend)

    def loss(*tensors: Tensor) -> Tensor:
        model = replace(problem.model, **dict(zip(compare.TENSORS, tensors, strict=True)))
        value = logprobs.run(problem, replace(model, hidden=model.hidden.sin()), name)
        return (value * weights).sum()

    def trained(loss_of: Any) -> list[Tensor]:
        leaves = problem.model.leaves(compare.TENSORS)
        tensors, losses = [getattr(leaves, tensor) for tensor in compare.TENSORS], []
        for _ in range(3):
            found = loss_of(*tensors)
            grads = torch.autograd.grad(found, tensors)
            losses.append(found.detach())
            tensors = [(t - 0.01 * g).detach().requires_grad_() for t, g in zip(tensors, grads, strict=True)]
        return [*losses, *grads, *tensors]

    for found, expected in zip(trained(torch.compile(loss, fullgraph=True)), trained(loss), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
