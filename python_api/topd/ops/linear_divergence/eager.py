"""The rows of linear_divergence in eager torch: what the backend "eager" runs between the matrix products.

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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.logits import shape_logits
from topd.ops.linear_divergence.spec import ROWS_INPUTS, Rows, RowsInputs, RowsOutputs, RowSpec
from topd.ops.shared.engines import eager_kernel
from topd.ops.shared.float16_scale import scaled_into
from topd.ops.shared.row_math import Distribution, distribution, kl_terms, log_ratio, mixture
from topd.scores import FIELDS


class Pair(NamedTuple):
    """Both sides of some rows and d = log p_T - log p_S [C, V]."""

    teacher: Distribution
    student: Distribution
    d: Tensor


def _centred(p: Tensor, a: Tensor, student: Distribution) -> Tensor:
    """Return p (A - sum p A) with A taken relative to the student's most likely entry; entries with p_S = 0 count nothing."""
    a = (a - a.gather(-1, student.mode)).masked_fill(student.logits.isneginf(), 0.0)
    return p * (a - (p * a).sum(-1, keepdim=True))


def _student_minus_teacher(p_teacher: Tensor, p_student: Tensor, d: Tensor) -> Tensor:
    """Return p_S - p_T, which keeps its digits where the two are near."""
    return torch.where(d.abs() <= 1, p_teacher * torch.expm1(-d), p_student - p_teacher)


ValueAndGrad = tuple[Tensor, Tensor]


def _forward_kl(pair: Pair, clip: float) -> ValueAndGrad:
    """Return value and gradient. With a clip, U = {e <= clip}, e = p_T d: sum of min(e, clip); p_S sum_U p_T - p_T 1_U."""
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    terms, gap = kl_terms(p_teacher, p_student, d), _student_minus_teacher(p_teacher, p_student, d)
    if clip == float("inf"):
        return terms.sum(-1), gap
    e = (p_teacher * d).masked_fill(d == -torch.inf, 0.0).masked_fill(d == torch.inf, torch.inf)
    clipped = e > clip
    terms = torch.where(clipped, gap + clip, terms)
    grad = torch.where(clipped, p_student, gap)
    return terms.sum(-1), grad - p_student * (p_teacher * clipped).sum(-1, keepdim=True)


def _reverse_kl(pair: Pair, parameter: float) -> ValueAndGrad:
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    return _none_where_infinite(kl_terms(p_student, p_teacher, -d).sum(-1), _centred(p_student, -d, pair.student))


def _jsd(pair: Pair, beta: float) -> ValueAndGrad:
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    mix = mixture(p_teacher, p_student, d, beta)
    terms = beta * kl_terms(p_teacher, mix.m, mix.teacher_d)
    value = (terms + (1 - beta) * kl_terms(p_student, mix.m, mix.student_d)).sum(-1)
    return _none_where_infinite(value, (1 - beta) * _centred(p_student, mix.student_d, pair.student))


def _skew_kl(pair: Pair, alpha: float) -> ValueAndGrad:
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    mix = mixture(p_teacher, p_student, d, alpha)
    value = kl_terms(p_teacher, mix.m, mix.teacher_d).sum(-1)
    return _none_where_infinite(value, -(1 - alpha) * _centred(p_student, mix.teacher_excess, pair.student))


def _skew_reverse_kl(pair: Pair, alpha: float) -> ValueAndGrad:
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    mix = mixture(p_teacher, p_student, d, 1.0 - alpha)
    value = kl_terms(p_student, mix.m, mix.student_d).sum(-1)
    return _none_where_infinite(value, _centred(p_student, mix.student_d - alpha * mix.student_excess, pair.student))


def _total_variation(pair: Pair, parameter: float) -> ValueAndGrad:
    p_student = pair.student.probabilities
    gap = _student_minus_teacher(pair.teacher.probabilities, p_student, pair.d)
    return 0.5 * gap.abs().sum(-1), 0.5 * _centred(p_student, gap.sign(), pair.student)


def _none_where_infinite(value: Tensor, grad: Tensor) -> ValueAndGrad:
    """Return both, the gradient of a row 0 where its value is inf."""
    return value, torch.where(value.isinf().unsqueeze(-1), 0.0, grad)


# Each from both sides and the divergence's parameter.
DIVERGENCES: dict[str, Callable[[Pair, float], ValueAndGrad]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
}


def _lost_mass(logits: Tensor, common: Distribution) -> Tensor:
    """Return the probability [C] beyond the common vocabulary."""
    vocab = common.logits.shape[-1]
    if logits.shape[-1] == vocab:
        return torch.zeros_like(common.top[..., 0])
    lse = (common.top + common.log_rest)[..., 0]
    return torch.sigmoid(logits[..., vocab:].logsumexp(-1) - lse)


def _entropy(side: Distribution) -> Tensor:
    logprobs = side.logprobs
    return -(side.probabilities * logprobs).masked_fill(logprobs == -torch.inf, 0.0).sum(-1)


def token_logprob(side: Distribution, tokens: Tensor) -> Tensor:
    """Return log p(tokens) [C]; -inf for a token outside the vocabulary (only a GPU, which does not check, lets one come
    here)."""
    vocab = side.logits.shape[-1]
    logprobs = side.logprobs.gather(-1, tokens.clamp(0, vocab - 1).unsqueeze(-1))[..., 0]
    return logprobs.masked_fill((tokens < 0) | (tokens >= vocab), -torch.inf)


def _cross_entropy_grad(student: Distribution, tokens: Tensor, logprob: Tensor) -> Tensor:
    """Return p_S - onehot(token) [C, V], the token's own entry as expm1(log p)."""
    p = student.probabilities
    index = tokens.clamp(0, p.shape[-1] - 1).unsqueeze(-1)
    outside = ((tokens < 0) | (tokens >= p.shape[-1])).unsqueeze(-1)
    return p.scatter(-1, index, torch.where(outside, p.gather(-1, index), logprob.unsqueeze(-1).expm1()))


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
    """Return divergences, scores and the gradient to the student's product from matrix products (adapters included).

    Args:
        student_product, teacher_product: [C, V_s], [C, V_t] float32 or float64; constants.
        student_bias, teacher_bias: [V_s], [V_t] of that dtype, or None.
        tokens: [C] int64 within the common vocabulary, or None.
        spec: the numbers.
        grad, scores: what to compute beside the value.
    """
    inputs = RowsInputs(student_product, teacher_product, student_bias, teacher_bias, tokens, spec, grad, scores)
    rows = _common_rows(inputs)
    if rows.grad_logits is None:
        return rows
    padded = torch.zeros_like(student_product)
    padded[..., : rows.grad_logits.shape[-1]] = rows.grad_logits
    return rows._replace(grad_logits=padded)


@eager_kernel("divergence_rows")
def _kernel(*flat: Any) -> RowsOutputs:
    inputs = ROWS_INPUTS.unpack(*flat)
    rows = _common_rows(inputs)
    if rows.grad_logits is not None:
        tile, vocab = inputs.student_product if inputs.grad_tile is None else inputs.grad_tile, rows.grad_logits.shape[-1]
        scaled_into(tile[:, :vocab], rows.grad_logits, inputs.grad_scale)
        tile[:, vocab:] = 0.0
    return RowsOutputs(rows.value, rows.scores, rows.finite)


def _common_rows(inputs: RowsInputs) -> Rows:
    """Return the rows with the gradient over the common vocabulary alone."""
    spec, tokens = inputs.spec, inputs.tokens
    student_full = shape_logits(
        inputs.student_product, inputs.student_bias, spec.student_scale, spec.student_softcap, spec.temperature
    )
    teacher_full = shape_logits(
        inputs.teacher_product, inputs.teacher_bias, spec.teacher_scale, spec.teacher_softcap, spec.temperature
    )
    vocab = min(student_full.shape[-1], teacher_full.shape[-1])
    student, teacher = distribution(student_full[..., :vocab]), distribution(teacher_full[..., :vocab])
    pair = Pair(teacher, student, log_ratio(teacher, student))
    finite = (student.exists & teacher.exists)[..., 0]
    value, grad_logits = DIVERGENCES[spec.divergence](pair, spec.parameter)

    student_logprob = teacher_logprob = torch.zeros_like(value)
    if tokens is not None:
        student_logprob, teacher_logprob = token_logprob(student, tokens), token_logprob(teacher, tokens)
        if spec.hard_weight:
            value = value - spec.hard_weight * student_logprob
            grad_logits = grad_logits + spec.hard_weight * _cross_entropy_grad(student, tokens, student_logprob)

    scores = value.new_empty((0, *value.shape))
    if inputs.scores:
        known = {
            "student_logprob": student_logprob,
            "teacher_logprob": teacher_logprob,
            "student_lost_mass": _lost_mass(student_full, student),
            "teacher_lost_mass": _lost_mass(teacher_full, teacher),
        }
        scores = _scores(pair, known).masked_fill(~finite, torch.nan)
    value = value.masked_fill(~finite, torch.nan)
    if not inputs.grad:
        return Rows(value, scores, finite, None)
    grad_logits = _through_shape(grad_logits, student, spec).masked_fill(~finite.unsqueeze(-1), 0.0)
    return Rows(value, scores, finite, grad_logits)


def _scores(pair: Pair, known: dict[str, Tensor]) -> Tensor:
    """Return the scores [9, C] from both distributions and the scores that are known already."""
    teacher, student, d = pair
    p_teacher, p_student = teacher.probabilities, student.probabilities
    columns = known | {
        "forward_kl": kl_terms(p_teacher, p_student, d).sum(-1),
        "reverse_kl": kl_terms(p_student, p_teacher, -d).sum(-1),
        "student_entropy": _entropy(student),
        "teacher_entropy": _entropy(teacher),
        "top1_agreement": (student.mode == teacher.mode)[..., 0].to(d.dtype),
    }
    return torch.stack([columns[name] for name in FIELDS])


def _through_shape(grad_logits: Tensor, student: Distribution, spec: RowSpec) -> Tensor:
    """Return the gradient to the product from that to the logits: through temperature, scale and softcap."""
    grad_logits = grad_logits * (spec.student_scale / spec.temperature)
    if spec.student_softcap is None:
        return grad_logits
    tanh = student.logits * (spec.temperature / spec.student_softcap)
    return grad_logits * (1 - tanh * tanh)
