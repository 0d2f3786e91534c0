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
from topd.ops.linear_divergence.statistics import Side, Sums, statistics
from topd.ops.shared.engines import eager_kernel
from topd.ops.shared.float16_scale import scaled_into
from topd.ops.shared.row_math import Distribution, distribution, kl_terms, log_ratio, mixture
from topd.ops.shared.shard import WHOLE, Shard
from topd.scores import FIELDS


class Pair(NamedTuple):
    """Both sides of some rows and d = log p_T - log p_S [C, V]."""

    teacher: Distribution
    student: Distribution
    d: Tensor


class Terms(NamedTuple):
    """What the sweep over some rows makes of a divergence: its value's sum [C], A [C, V] and the sum E [C, 1], from which the
    gradient to the logits is made. `reference` [C, 1]: what A was relative to; the gradient is factor p_S (A - E) where it is
    given, else A - p_S E, or A where E is None."""

    value: Tensor
    a: Tensor
    mean: Tensor | None = None
    reference: Tensor | None = None
    factor: float = 1.0

    def gradient(self, p_student: Tensor, sums: Sums) -> Tensor:
        """Return the gradient to the logits, with the sums over all ranks."""
        if sums.mean is None:
            return self.a
        if self.reference is None:
            return self.a - p_student * sums.mean
        grad = self.factor * (p_student * (self.a - sums.mean))
        return torch.where(sums.value.isinf().unsqueeze(-1), 0.0, grad)


def _centred(value: Tensor, a: Tensor, student: Distribution, factor: float = 1.0) -> Terms:
    """Return the terms of factor p_S (A - E) with A taken relative to the student's most likely entry here; entries with
    p_S = 0 count nothing."""
    absent = student.logits.isneginf()
    if not a.shape[-1]:
        nothing = torch.zeros_like(student.top)
        return Terms(value, a, nothing, nothing, factor)
    reference = a.gather(-1, student.mode)
    a = (a - reference).masked_fill(absent, 0.0)
    mean = (student.probabilities * a).sum(-1, keepdim=True)
    return Terms(value, a, mean, reference.masked_fill(absent.gather(-1, student.mode), 0.0), factor)


def _student_minus_teacher(p_teacher: Tensor, p_student: Tensor, d: Tensor) -> Tensor:
    """Return p_S - p_T, which keeps its digits where the two are near."""
    return torch.where(d.abs() <= 1, p_teacher * torch.expm1(-d), p_student - p_teacher)


def _forward_kl(pair: Pair, clip: float) -> Terms:
    """With a clip, U = {e <= clip}, e = p_T d: sum of min(e, clip); p_S sum_U p_T - p_T 1_U."""
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    terms, gap = kl_terms(p_teacher, p_student, d), _student_minus_teacher(p_teacher, p_student, d)
    if clip == float("inf"):
        return Terms(terms.sum(-1), gap)
    e = (p_teacher * d).masked_fill(d == -torch.inf, 0.0).masked_fill(d == torch.inf, torch.inf)
    clipped = e > clip
    terms = torch.where(clipped, gap + clip, terms)
    return Terms(terms.sum(-1), torch.where(clipped, p_student, gap), (p_teacher * clipped).sum(-1, keepdim=True))


def _reverse_kl(pair: Pair, parameter: float) -> Terms:
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    return _centred(kl_terms(p_student, p_teacher, -d).sum(-1), -d, pair.student)


def _jsd(pair: Pair, beta: float) -> Terms:
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    mix = mixture(p_teacher, p_student, d, beta)
    terms = beta * kl_terms(p_teacher, mix.m, mix.teacher_d)
    value = (terms + (1 - beta) * kl_terms(p_student, mix.m, mix.student_d)).sum(-1)
    return _centred(value, mix.student_d, pair.student, 1 - beta)


def _skew_kl(pair: Pair, alpha: float) -> Terms:
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    mix = mixture(p_teacher, p_student, d, alpha)
    value = kl_terms(p_teacher, mix.m, mix.teacher_d).sum(-1)
    return _centred(value, mix.teacher_excess, pair.student, -(1 - alpha))


def _skew_reverse_kl(pair: Pair, alpha: float) -> Terms:
    p_teacher, p_student, d = pair.teacher.probabilities, pair.student.probabilities, pair.d
    mix = mixture(p_teacher, p_student, d, 1.0 - alpha)
    value = kl_terms(p_student, mix.m, mix.student_d).sum(-1)
    return _centred(value, mix.student_d - alpha * mix.student_excess, pair.student)


def _total_variation(pair: Pair, parameter: float) -> Terms:
    gap = _student_minus_teacher(pair.teacher.probabilities, pair.student.probabilities, pair.d)
    return _centred(0.5 * gap.abs().sum(-1), gap.sign(), pair.student, 0.5)


# Each from both sides and the divergence's parameter.
DIVERGENCES: dict[str, Callable[[Pair, float], Terms]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
}


def _side(logits: Tensor, vocab: int, tokens: Tensor | None, inputs: RowsInputs, shard: Shard) -> Side:
    """Return what is known of a side's rows from its own logits [C, V], of which the first `vocab` are compared.

    A token outside the vocabulary (only a GPU, which does not check, lets one come here) has the logit -inf.
    """
    token = beyond = None
    if tokens is not None:
        token = logits.new_full(tokens.shape, -torch.inf)
        if vocab:
            inside = (tokens >= 0) & (tokens < vocab)
            token = logits.gather(-1, tokens.clamp(0, vocab - 1).unsqueeze(-1))[..., 0].masked_fill(~inside, -torch.inf)
    if inputs.scores and (shard.split or logits.shape[-1] > vocab):
        beyond = logits[..., vocab:].logsumexp(-1)
    return Side(distribution(logits[..., :vocab]), token, beyond)


def _lost_mass(side: Side) -> Tensor:
    """Return the probability [C] beyond the common vocabulary."""
    top, log_rest = side.common.top[..., 0], side.common.log_rest[..., 0]
    return torch.zeros_like(top) if side.beyond is None else torch.sigmoid(side.beyond - (top + log_rest)).to(top.dtype)


def _token_logprob(side: Side) -> Tensor:
    """Return log p(tokens) [C]; 0 without tokens."""
    top, log_rest = side.common.top[..., 0], side.common.log_rest[..., 0]
    return torch.zeros_like(top) if side.token is None else ((side.token - top) - log_rest).to(top.dtype)


def _entropy(side: Distribution) -> Tensor:
    logprobs = side.logprobs
    return -(side.probabilities * logprobs).masked_fill(logprobs == -torch.inf, 0.0).sum(-1)


def _cross_entropy_grad(student: Distribution, tokens: Tensor, logprob: Tensor) -> Tensor:
    """Return p_S - onehot(token) [C, V], the token's own entry as expm1(log p)."""
    p = student.probabilities
    if not p.shape[-1]:
        return p
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
    rows = _common_rows(inputs, WHOLE)
    if rows.grad_logits is None:
        return rows
    padded = torch.zeros_like(student_product)
    padded[..., : rows.grad_logits.shape[-1]] = rows.grad_logits
    return rows._replace(grad_logits=padded)


@eager_kernel("divergence_rows")
def _kernel(*flat: Any) -> RowsOutputs:
    rows = rows_in_tiles(ROWS_INPUTS.unpack(*flat), WHOLE)
    return RowsOutputs(rows.value, rows.scores, rows.finite)


def rows_in_tiles(inputs: RowsInputs, shard: Shard) -> Rows:
    """Return what topd::divergence_rows does, of rows whose vocabulary may be split; the gradient is in one of the tiles."""
    rows = _common_rows(inputs, shard)
    if rows.grad_logits is None:
        return rows
    tile, vocab = inputs.student_product if inputs.grad_tile is None else inputs.grad_tile, rows.grad_logits.shape[-1]
    scaled_into(tile[:, :vocab], rows.grad_logits, inputs.grad_scale)
    tile[:, vocab:] = 0.0
    return rows._replace(grad_logits=tile)


def _common_rows(inputs: RowsInputs, shard: Shard) -> Rows:
    """Return the rows with the gradient over the common vocabulary alone: statistics, sweep, sums, gradient
    (`topd.ops.linear_divergence.statistics`)."""
    spec, tokens = inputs.spec, None if inputs.tokens is None else shard.local(inputs.tokens)
    student_full = shape_logits(
        inputs.student_product, inputs.student_bias, spec.student_scale, spec.student_softcap, spec.temperature
    )
    teacher_full = shape_logits(
        inputs.teacher_product, inputs.teacher_bias, spec.teacher_scale, spec.teacher_softcap, spec.temperature
    )
    vocab = min(student_full.shape[-1], teacher_full.shape[-1])
    own, other = (_side(logits, vocab, tokens, inputs, shard) for logits in (student_full, teacher_full))
    known = statistics(own, other, shard)
    teacher, student = known.teacher.common, known.student.common
    pair = Pair(teacher, student, log_ratio(teacher, student))
    finite = (student.exists & teacher.exists)[..., 0]

    terms = DIVERGENCES[spec.divergence](pair, spec.parameter)
    scored = _scored_sums(pair) if inputs.scores else {}
    sums = Sums(terms.value, scored, terms.mean, terms.reference).over(shard, known.parts)

    value, student_logprob = sums.value, _token_logprob(known.student)
    if spec.hard_weight and tokens is not None:
        value = value - spec.hard_weight * student_logprob
    scores = value.new_empty((0, *value.shape))
    if inputs.scores:
        columns = sums.scores | {
            "student_logprob": student_logprob,
            "teacher_logprob": _token_logprob(known.teacher),
            "top1_agreement": known.agree.to(value.dtype),
            "student_lost_mass": _lost_mass(known.student),
            "teacher_lost_mass": _lost_mass(known.teacher),
        }
        scores = torch.stack([columns[name] for name in FIELDS]).masked_fill(~finite, torch.nan)
    value = value.masked_fill(~finite, torch.nan)
    if not inputs.grad:
        return Rows(value, scores, finite, None)
    grad_logits = terms.gradient(student.probabilities, sums)
    if spec.hard_weight and tokens is not None:
        grad_logits = grad_logits + spec.hard_weight * _cross_entropy_grad(student, tokens, student_logprob)
    grad_logits = _through_shape(grad_logits, student, spec).masked_fill(~finite.unsqueeze(-1), 0.0)
    return Rows(value, scores, finite, grad_logits)


def _scored_sums(pair: Pair) -> dict[str, Tensor]:
    """Return the scores that are sums over the vocabulary, each [C]."""
    teacher, student, d = pair
    p_teacher, p_student = teacher.probabilities, student.probabilities
    return {
        "forward_kl": kl_terms(p_teacher, p_student, d).sum(-1),
        "reverse_kl": kl_terms(p_student, p_teacher, -d).sum(-1),
        "student_entropy": _entropy(student),
        "teacher_entropy": _entropy(teacher),
    }


def _through_shape(grad_logits: Tensor, student: Distribution, spec: RowSpec) -> Tensor:
    """Return the gradient to the product from that to the logits: through temperature, scale and softcap."""
    grad_logits = grad_logits * (spec.student_scale / spec.temperature)
    if spec.student_softcap is None:
        return grad_logits
    tanh = student.logits * (spec.temperature / spec.student_softcap)
    return grad_logits * (1 - tanh * tanh)
