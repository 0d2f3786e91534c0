"""What topd is compared with: the textbook formulas in plain torch, with autograd's gradients.

In float64 they are the truth; at the tensors' own dtypes they are the yardstick, what a user of eager torch would get.
Nothing here is taken from topd's own formulas: log-softmax, products of probabilities and log-ratios, sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import topd

TENSORS = ("hidden", "weight", "bias", "a", "b")
DIVERGENCES = (
    topd.ForwardKL(),
    topd.ForwardKL(entry_clip=0.05),
    topd.ReverseKL(),
    topd.JSD(),
    topd.JSD(beta=0.2),
    topd.SkewKL(),
    topd.SkewReverseKL(),
    topd.TotalVariation(),
)

# How far off an element may be where eager torch happens to be exact, in units of the tensor's largest: logits of
# magnitude 50 are themselves known to 3e-6 in float32.
CONSTANT = 2e-6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"student": {"scale": 0.3}, "teacher": {"scale": 1.7}},
    "softcap": {"student": {"softcap": 5.0}, "teacher": {"softcap": 9.0}},
    "bias": {"student": {"bias": True}, "teacher": {"bias": True}},
    "adapter": {"student": {"rank": 3}, "teacher": {"rank": 2}},
    "student_larger": {"student": {"vocab": 53, "bias": True, "rank": 2}},
    "teacher_larger": {"teacher": {"vocab": 53, "bias": True, "rank": 2}},
    "mask": {"mask": True},
    "hard_weight": {"hard_weight": 0.6},
    "everything": {
        "student": {"bias": True, "rank": 3, "softcap": 8.0, "scale": 0.8, "vocab": 47},
        "teacher": {"bias": True, "rank": 2, "softcap": 11.0, "scale": -1.3},
        "temperature": 1.6,
        "mask": True,
        "hard_weight": 0.25,
    },
}


@dataclass(frozen=True)
class Model:
    """One side: hidden states [..., H] and what makes up its head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    def head(self) -> topd.Head:
        adapter = None if self.a is None else topd.LowRank(self.a, self.b, self.scaling)
        return topd.Head(self.weight, self.bias, scale=self.scale, softcap=self.softcap, adapter=adapter)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "Model":
        tensors = {name: getattr(self, name) for name in TENSORS}
        return replace(self, **{name: change(name, value) for name, value in tensors.items() if value is not None})

    def to(self, *where: Any) -> "Model":
        return self.map(lambda _, value: value.to(*where))

    def leaves(self, trainable: tuple[str, ...], dtype: torch.dtype | None = None) -> "Model":
        """Return copies with the same strides, of which the trainable ones require grad."""

        def leaf(name: str, value: Tensor) -> Tensor:
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
            return copy.to(dtype or value.dtype).requires_grad_(name in trainable)

        return self.map(leaf)

    def logits(self) -> Tensor:
        """Return logits by the formula of the public contract, in this model's own dtypes."""
        x = F.linear(self.hidden, self.weight)
        if self.bias is not None:
            x = x + self.bias
        if self.a is not None:
            x = x + self.scaling * F.linear(F.linear(self.hidden, self.a), self.b)
        x = self.scale * x
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


@dataclass(frozen=True)
class Problem:
    """The arguments of `topd.linear_divergence` that its value depends on."""

    student: Model
    teacher: Model
    divergence: topd.Divergence = topd.ReverseKL()  # noqa: RUF009  (frozen)
    temperature: float = 1.0
    mask: Tensor | None = None
    tokens: Tensor | None = None
    hard_weight: float = 0.0

    def to(self, *where: Any) -> "Problem":
        """Return it on another device or, for what is floating, in another dtype."""
        device = (
            {}
            if isinstance(where[0], torch.dtype)
            else {name: value.to(*where) for name in ("mask", "tokens") if (value := getattr(self, name)) is not None}
        )
        return replace(self, student=self.student.to(*where), teacher=self.teacher.to(*where), **device)

    def options(self) -> dict[str, Any]:
        names = ("divergence", "temperature", "mask", "tokens", "hard_weight")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Outcome:
    value: Tensor
    grads: dict[str, Tensor | None] = field(default_factory=dict)


def row_divergence(divergence: topd.Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """Return a divergence [...] of log-probabilities [..., V], each formula as it is printed."""
    p_student, p_teacher = student.exp(), teacher.exp()

    def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.where(p > 0, p * (log_p - log_q), 0.0)

    def mixed(share: float) -> Tensor:
        """Return the log of (1 - share) p_S + share p_T."""
        return torch.logaddexp(student + math.log(1 - share), teacher + math.log(share))

    match divergence:
        case topd.ForwardKL(entry_clip=None):
            terms = kl(p_teacher, teacher, student)
        case topd.ForwardKL(entry_clip=clip):
            terms = kl(p_teacher, teacher, student).clamp(max=clip)
        case topd.ReverseKL():
            terms = kl(p_student, student, teacher)
        case topd.JSD(beta=beta):
            terms = beta * kl(p_teacher, teacher, mixed(beta)) + (1 - beta) * kl(p_student, student, mixed(beta))
        case topd.SkewKL(alpha=alpha):
            terms = kl(p_teacher, teacher, mixed(alpha))
        case topd.SkewReverseKL(alpha=alpha):
            terms = kl(p_student, student, mixed(1 - alpha))
        case topd.TotalVariation():
            terms = (p_student - p_teacher).abs() / 2
    return terms.sum(-1)


def kept(problem: Problem) -> Tensor:
    """Return which rows count, [...] bool."""
    return torch.ones_like(problem.student.hidden[..., 0], dtype=torch.bool) if problem.mask is None else problem.mask


def both_logprobs(problem: Problem, student: Model, teacher: Model) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the unmasked rows [M, V] on the common vocabulary, student first, at least in float32."""
    rows, vocab = kept(problem), min(student.weight.shape[0], teacher.weight.shape[0])
    both = [replace(model, hidden=model.hidden[rows]).logits()[..., :vocab] for model in (student, teacher)]
    dtype = torch.promote_types(torch.promote_types(both[0].dtype, both[1].dtype), torch.float32)
    return tuple((logits.to(dtype) / problem.temperature).log_softmax(-1) for logits in both)


def plain(
    problem: Problem,
    upstream: Tensor | None = None,
    *,
    trainable: tuple[str, ...] = TENSORS,
    dtype: torch.dtype | None = torch.float64,
) -> Outcome:
    """Return value and gradients in eager torch: the truth in float64, the yardstick with dtype=None (the tensors' own)."""
    student = problem.student.leaves(trainable, dtype)
    teacher = problem.teacher if dtype is None else problem.teacher.to(dtype)
    student_logprobs, teacher_logprobs = both_logprobs(problem, student, teacher)
    rows = kept(problem)
    losses = row_divergence(problem.divergence, student_logprobs, teacher_logprobs)
    if problem.hard_weight:
        index = problem.tokens[rows].unsqueeze(-1)
        losses = losses - problem.hard_weight * student_logprobs.gather(-1, index).squeeze(-1)
    value = losses.new_zeros(rows.shape).masked_scatter(rows, losses)
    return Outcome(value.detach(), gradients(value, upstream, student))


def by_topd(
    problem: Problem,
    backend: str,
    upstream: Tensor | None = None,
    *,
    trainable: tuple[str, ...] = TENSORS,
    **options: Any,
) -> Outcome:
    """Return the same of `topd.linear_divergence`."""
    student = problem.student.leaves(trainable)
    sides = (student.hidden, student.head(), problem.teacher.hidden, problem.teacher.head())
    value = topd.linear_divergence(*sides, **problem.options(), backend=backend, **options)
    return Outcome(value.detach(), gradients(value, upstream, student))


def gradients(value: Tensor, upstream: Tensor | None, model: Model) -> dict[str, Tensor | None]:
    """Return the gradient of each tensor that a model has, of value times upstream; nothing without upstream."""
    if upstream is None:
        return {}
    value.backward(upstream.to(value.dtype))
    return {name: getattr(model, name).grad for name in TENSORS if getattr(model, name) is not None}


def outcome_of(model: Model, dtype: torch.dtype | None, compute: Callable[[Model], Tensor]) -> Outcome:
    """Return what compute makes of the model's leaves, and its gradients, each value with an upstream gradient of its own."""
    leaves = model.leaves(TENSORS, dtype)
    value = compute(leaves)
    value.backward(torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=value.device).view(value.shape))
    return Outcome(value.detach(), {name: leaf.grad for name in TENSORS if (leaf := getattr(leaves, name)) is not None})


def assert_near(value: Tensor, truth: Tensor, tolerance: float, what: str = "") -> None:
    """Check that shapes agree, and that no element is off by more than tolerance times the largest true one."""
    assert value.shape == truth.shape, f"{what}: {value.shape} for {truth.shape}"
    assert value.isfinite().all(), f"{what} is not finite"
    if truth.numel():
        worst, scale = (value.double() - truth).abs().max().item(), truth.abs().max().item()
        assert worst <= tolerance * scale, f"{what}: off by {worst:.3g}, the largest is {scale:.3g}"


def assert_outcome(outcome: Outcome, truth: Outcome, tolerance: float) -> None:
    """Check that value and every gradient are near the truth, and that there is none where none is due."""
    assert_near(outcome.value, truth.value, tolerance, "value")
    assert outcome.grads.keys() == truth.grads.keys()
    for name, true in truth.grads.items():
        assert (outcome.grads[name] is None) == (true is None), f"gradient of {name}"
        if true is not None:
            assert_near(outcome.grads[name], true, tolerance, f"gradient of {name}")


def error_and_allowed(value: Tensor, yardstick: Tensor, truth: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    """Return each element's error, and the one that is allowed: eager torch's, the result's rounding and a constant."""
    assert value.dtype == yardstick.dtype, f"{value.dtype} where eager has {yardstick.dtype}"
    info = torch.finfo(value.dtype)
    rounding = truth.abs() * info.eps / 2 + info.smallest_normal * info.eps
    return (value.double() - truth).abs(), (yardstick.double() - truth).abs() + rounding + constant * truth.abs().max()


def assert_no_worse(value: Tensor, yardstick: Tensor, truth: Tensor, constant: float, what: str = "") -> None:
    """Check that each element is as near to the truth as eager torch's, but for the result's rounding and a small constant.

    constant is in units of the largest true element; it is there because eager is exact somewhere by luck. On a GPU both round
    the operands of the products to 16 bits where the models have them: there an element is off by luck, and the root of the
    mean square is judged.
    """
    error, allowed = error_and_allowed(value, yardstick, truth, constant)
    if value.device.type == "cuda" and value.dtype in (torch.bfloat16, torch.float16):
        error, allowed = (each.square().mean().sqrt() for each in (error, allowed))
    excess = (error / allowed).max().item() if truth.numel() else 0.0
    assert excess <= 1, f"{what}: an element is {excess:.3g} times as wrong as allowed"


def random_model(
    n: int | tuple[int, ...],
    vocab: int,
    width: int,
    *,
    bias: bool = False,
    rank: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Model:
    """Return a model in float64: signs mixed, every third row's logits five times as large (a peaked softmax)."""
    shape = (n,) if isinstance(n, int) else n
    hidden = torch.randn(*shape, width, dtype=torch.float64)
    hidden.view(-1, width)[::3] *= 5
    weight = torch.randn(vocab, width, dtype=torch.float64)
    low_rank = (torch.randn(rank, width).double(), torch.randn(vocab, rank).double()) if rank else (None, None)
    offset = 2 * torch.randn(vocab, dtype=torch.float64) if bias else None
    return Model(hidden, weight, offset, *low_rank, scaling=0.5, scale=scale, softcap=softcap)


def random_problem(
    options: dict[str, Any],
    divergence: topd.Divergence = DIVERGENCES[2],
    *,
    n: int = 11,
    vocab: int = 41,
) -> Problem:
    """Return a problem with the options of one entry of OPTIONS. Masked tokens are -100."""
    student = {"vocab": vocab, "width": 7} | options.get("student", {})
    teacher = {"vocab": vocab, "width": 5} | options.get("teacher", {})
    tokens, mask = torch.randint(vocab, (n,)), None
    if "mask" in options:
        mask = torch.rand(n) < 0.6
        tokens[~mask] = -100
    numbers = {name: options[name] for name in ("temperature", "hard_weight") if name in options}
    sides = random_model(n, **student), random_model(n, **teacher)
    return Problem(*sides, divergence, mask=mask, tokens=tokens, **numbers)
