"""topd::linear_divergence in eager torch on full logits: the definition of the math.

From logits (bias, scale, softcap and temperature applied) of the common vocabulary, with d = log p_T - log p_S and the terms of
`topd.ops.shared.row_math`:

Gradients to the logits, each centred at the student's most likely entry (A below is A_v minus that entry's A):
    forward KL         p_S - p_T                          with the entry clip: see `_forward_kl`
    reverse KL         p_S (A - E),  A = -d,              E = sum p_S A
    JSD                (1 - beta) p_S (A - E),            A = log p_S - log m
    skew KL            -(1 - alpha) p_S (A - E),          A = p_T / m
    skew reverse KL    p_S (A - E),                       A = log p_S - log m - alpha p_S / m
    total variation    1/2 p_S (A - E),                   A = sign(p_S - p_T)
Where a value is inf the forward KL's gradient is still p_S - p_T and any other row's is 0. A row whose logits hold a NaN or
+inf, or nothing but -inf, has no distribution: its value and scores are NaN, its gradient is reported through `finite`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.checks.values import in_vocabulary, no_second_derivative
from topd.head import Head
from topd.logits import shape_logits
from topd.ops.shared.full_products import head_product
from topd.ops.shared.row_math import Distribution, distribution, kl_terms, log_ratio, mixture
from topd.scores import FIELDS

COMMON_VOCABULARY = "the vocabulary that both heads share"


class RowSpec(NamedTuple):
    """The numbers that turn two matrix products into divergences; the order of the op's arguments."""

    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    temperature: float
    divergence: str
    parameter: float
    hard_weight: float

    def with_numbers(self, temperature: float, parameter: float, hard_weight: float) -> "RowSpec":
        """The same with other values of what may change from call to call."""
        return self._replace(temperature=temperature, parameter=parameter, hard_weight=hard_weight)

    @property
    def jumps(self) -> bool:
        """Whether the gradient to the logits jumps: the total variation's where p_S = p_T, the entry clip's where an entry
        reaches it."""
        return self.divergence == "total_variation" or (self.divergence == "forward_kl" and self.parameter < float("inf"))


class Rows(NamedTuple):
    """Per row: value [C], scores [9, C] (or empty), finite [C] bool; grad_logits [C, V_s] to the raw product, or None."""

    value: Tensor
    scores: Tensor
    finite: Tensor
    grad_logits: Tensor | None


def _centred(p: Tensor, a: Tensor, student: Distribution) -> Tensor:
    """p (A - sum p A) with A taken relative to the student's most likely entry; entries with p_S = 0 count nothing."""
    a = (a - a.gather(-1, student.mode)).masked_fill(student.logits.isneginf(), 0.0)
    return p * (a - (p * a).sum(-1, keepdim=True))


def _student_minus_teacher(p_teacher: Tensor, p_student: Tensor, d: Tensor) -> Tensor:
    return torch.where(d.abs() <= 1, p_teacher * torch.expm1(-d), p_student - p_teacher)


def _forward_kl(p_teacher: Tensor, p_student: Tensor, d: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Value and gradient. With a clip, U = {e <= clip}, e = p_T d: sum of min(e, clip); p_S sum_U p_T - p_T 1_U."""
    terms, gap = kl_terms(p_teacher, p_student, d), _student_minus_teacher(p_teacher, p_student, d)
    if clip == float("inf"):
        return terms.sum(-1), gap
    e = (p_teacher * d).masked_fill(d == -torch.inf, 0.0).masked_fill(d == torch.inf, torch.inf)
    clipped = e > clip
    terms = torch.where(clipped, gap + clip, terms)
    grad = torch.where(clipped, p_student, gap)
    return terms.sum(-1), grad - p_student * (p_teacher * clipped).sum(-1, keepdim=True)


def _value_and_grad(
    divergence: str, parameter: float, teacher: Distribution, student: Distribution, d: Tensor
) -> tuple[Tensor, Tensor]:
    p_teacher, p_student = teacher.probabilities, student.probabilities
    if divergence == "forward_kl":
        return _forward_kl(p_teacher, p_student, d, parameter)
    if divergence == "total_variation":
        gap = _student_minus_teacher(p_teacher, p_student, d)
        return 0.5 * gap.abs().sum(-1), 0.5 * _centred(p_student, gap.sign(), student)
    if divergence == "reverse_kl":
        value, grad = kl_terms(p_student, p_teacher, -d).sum(-1), _centred(p_student, -d, student)
    elif divergence == "jsd":
        mix = mixture(p_teacher, p_student, d, parameter)
        terms = parameter * kl_terms(p_teacher, mix.m, mix.teacher_d)
        value = (terms + (1 - parameter) * kl_terms(p_student, mix.m, mix.student_d)).sum(-1)
        grad = (1 - parameter) * _centred(p_student, mix.student_d, student)
    elif divergence == "skew_kl":
        mix = mixture(p_teacher, p_student, d, parameter)
        value = kl_terms(p_teacher, mix.m, mix.teacher_d).sum(-1)
        grad = -(1 - parameter) * _centred(p_student, mix.teacher_excess, student)
    elif divergence == "skew_reverse_kl":
        mix = mixture(p_teacher, p_student, d, 1.0 - parameter)
        value = kl_terms(p_student, mix.m, mix.student_d).sum(-1)
        grad = _centred(p_student, mix.student_d - parameter * mix.student_excess, student)
    else:
        raise ValueError(f"unknown divergence {divergence!r}")
    return value, torch.where(value.isinf().unsqueeze(-1), 0.0, grad)


def _lost_mass(logits: Tensor, common: Distribution) -> Tensor:
    vocab = common.logits.shape[-1]
    if logits.shape[-1] == vocab:
        return torch.zeros_like(common.top[..., 0])
    lse = (common.top + common.log_rest)[..., 0]
    return torch.sigmoid(logits[..., vocab:].logsumexp(-1) - lse)


def _entropy(side: Distribution) -> Tensor:
    logprobs = side.logprobs
    return -(side.probabilities * logprobs).masked_fill(logprobs == -torch.inf, 0.0).sum(-1)


def token_logprob(side: Distribution, tokens: Tensor) -> Tensor:
    """log p(tokens) [C]; -inf for a token outside the vocabulary (only a GPU, which does not check, lets one come here)."""
    vocab = side.logits.shape[-1]
    found = side.logprobs.gather(-1, tokens.clamp(0, vocab - 1).unsqueeze(-1))[..., 0]
    return found.masked_fill((tokens < 0) | (tokens >= vocab), -torch.inf)


def _cross_entropy_grad(student: Distribution, tokens: Tensor, logprob: Tensor) -> Tensor:
    """p_S - onehot(token), the token's own entry as expm1(log p)."""
    p = student.probabilities
    at = tokens.clamp(0, p.shape[-1] - 1).unsqueeze(-1)
    outside = ((tokens < 0) | (tokens >= p.shape[-1])).unsqueeze(-1)
    return p.scatter(-1, at, torch.where(outside, p.gather(-1, at), logprob.unsqueeze(-1).expm1()))


def divergence_rows(
    student_product: Tensor,
    teacher_product: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    spec: RowSpec,
    *,
    grad: bool,
    scores: bool,
) -> Rows:
    """From matrix products (adapters included) to divergences, scores and the gradient to the student's product.

    Args:
        student_product, teacher_product: [C, V_s], [C, V_t] float32 or float64; constants.
        student_bias, teacher_bias: [V_s], [V_t] of that dtype, or None.
        tokens: [C] int64 within the common vocabulary, or None.
        spec: the numbers.
        grad, scores: what to compute beside the value.
    """
    vocab = min(student_product.shape[-1], teacher_product.shape[-1])
    student_full = shape_logits(student_product, student_bias, spec.student_scale, spec.student_softcap, spec.temperature)
    teacher_full = shape_logits(teacher_product, teacher_bias, spec.teacher_scale, spec.teacher_softcap, spec.temperature)
    student, teacher = distribution(student_full[..., :vocab]), distribution(teacher_full[..., :vocab])
    d = log_ratio(teacher, student)
    finite = (student.exists & teacher.exists)[..., 0]
    value, grad_logits = _value_and_grad(spec.divergence, spec.parameter, teacher, student, d)

    student_logprob = teacher_logprob = torch.zeros_like(value)
    if tokens is not None:
        student_logprob, teacher_logprob = token_logprob(student, tokens), token_logprob(teacher, tokens)
        if spec.hard_weight:
            value = value - spec.hard_weight * student_logprob
            grad_logits = grad_logits + spec.hard_weight * _cross_entropy_grad(student, tokens, student_logprob)

    found = value.new_empty((0, *value.shape))
    if scores:
        p_teacher, p_student = teacher.probabilities, student.probabilities
        columns = {
            "forward_kl": kl_terms(p_teacher, p_student, d).sum(-1),
            "reverse_kl": kl_terms(p_student, p_teacher, -d).sum(-1),
            "student_entropy": _entropy(student),
            "teacher_entropy": _entropy(teacher),
            "student_logprob": student_logprob,
            "teacher_logprob": teacher_logprob,
            "top1_agreement": (student.mode == teacher.mode)[..., 0].to(value.dtype),
            "student_lost_mass": _lost_mass(student_full, student),
            "teacher_lost_mass": _lost_mass(teacher_full, teacher),
        }
        found = torch.stack([columns[name] for name in FIELDS]).masked_fill(~finite, torch.nan)
    value = value.masked_fill(~finite, torch.nan)
    if not grad:
        return Rows(value, found, finite, None)

    grad_logits = grad_logits * (spec.student_scale / spec.temperature)
    if spec.student_softcap is not None:
        tanh = student.logits * (spec.temperature / spec.student_softcap)
        grad_logits = grad_logits * (1 - tanh * tanh)
    padded = torch.zeros_like(student_product)
    padded[..., :vocab] = grad_logits.masked_fill(~finite.unsqueeze(-1), 0.0)
    return Rows(value, found, finite, padded)


class _RowsFunction(torch.autograd.Function):
    """`divergence_rows` as a differentiable function of the student's product (bias included)."""

    @staticmethod
    def forward(
        ctx: Any, student_product: Tensor, teacher_product: Tensor, tokens: Tensor | None, spec: RowSpec
    ) -> tuple[Tensor, Tensor]:
        rows = divergence_rows(student_product, teacher_product, None, None, tokens, spec, grad=True, scores=True)
        assert rows.grad_logits is not None
        ctx.save_for_backward(student_product, rows.grad_logits, rows.finite)
        ctx.mark_non_differentiable(rows.scores)
        return rows.value, rows.scores

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor, grad_scores: Tensor) -> Any:
        return _RowsGradient.apply(grad_value, *ctx.saved_tensors), None, None, None  # type: ignore[no-untyped-call]


class _RowsGradient(torch.autograd.Function):
    """Its backward, with the product as an input so that a second derivative is noticed, and refused."""

    @staticmethod
    def forward(ctx: Any, grad_value: Tensor, student_product: Tensor, grad_logits: Tensor, finite: Tensor) -> Tensor:
        upstream = grad_value.unsqueeze(-1)
        grad = grad_logits.masked_fill(~finite.unsqueeze(-1), torch.nan) * upstream
        return grad.masked_fill_(upstream == 0, 0.0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise no_second_derivative("linear_divergence")


def linear_divergence(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    mask: Tensor | None,
    tokens: Tensor | None,
    spec: RowSpec,
) -> tuple[Tensor, Tensor]:
    """Value [N] and scores [9, N] of hidden states [N, H]; the gradients of the two matrix products are autograd's."""
    dtype = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
    kept = torch.arange(student_hidden.shape[0], device=student_hidden.device) if mask is None else mask.nonzero()[:, 0]
    if tokens is not None:
        vocab = min(student.weight.shape[0], teacher.weight.shape[0])
        tokens = in_vocabulary("tokens", tokens[kept], vocab, COMMON_VOCABULARY)
    with torch.autocast(student_hidden.device.type, enabled=False):
        products = [
            head_product(hidden[kept], head, dtype) for hidden, head in ((student_hidden, student), (teacher_hidden, teacher))
        ]
        value, scores = _RowsFunction.apply(*products, tokens, spec)  # type: ignore[no-untyped-call]
    n = student_hidden.shape[0]
    return value.new_zeros(n).index_put((kept,), value), scores.new_zeros(len(FIELDS), n).index_copy(1, kept, scores)
