"""The math of a row: log-normalisers first, then sums of non-negative terms.

From logits y, with top = max y and rest = the sum of exp(y - top) over the entries beside the largest (it keeps the digits of
a peaked distribution):

    log p = (y - top) - log1p(rest)        d = log p_T - log p_S
    KL(p || q) = sum p phi(d),  phi(d) = exp(-d) + d - 1,  written q - p + p d where |d| > 1: no term is negative

csrc/shared/row_math.h and csrc/shared/distribution.h are the same in C++.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Distribution(NamedTuple):
    """One side's softmax over the common vocabulary, kept apart from its offset `top`, the logit at `mode`. Over the ranks of a
    sharded head `rest` is a double, and `mode` the most likely entry that is here."""

    logits: Tensor
    top: Tensor
    mode: Tensor
    rest: Tensor

    @property
    def exists(self) -> Tensor:
        return self.top.isfinite() & self.rest.isfinite()

    @property
    def log_rest(self) -> Tensor:
        return self.rest.log1p()

    @property
    def probabilities(self) -> Tensor:
        return (self.logits - self.top).exp() / (1 + self.rest).to(self.logits.dtype)

    @property
    def logprobs(self) -> Tensor:
        return (self.logits - self.top) - self.log_rest.to(self.logits.dtype)


def distribution(logits: Tensor) -> Distribution:
    if logits.shape[-1] == 0:  # a rank of a sharded head may hold nothing
        nothing = logits.new_full((*logits.shape[:-1], 1), -torch.inf)
        return Distribution(logits, nothing, torch.zeros_like(nothing, dtype=torch.int64), torch.zeros_like(nothing))
    mode = logits.argmax(-1, keepdim=True)
    top = logits.gather(-1, mode)
    rest = (logits - top).exp().scatter(-1, mode, 0.0).sum(-1, keepdim=True)
    return Distribution(logits, top, mode, rest)


def log_ratio(teacher: Distribution, student: Distribution) -> Tensor:
    """Return log p_T - log p_S; 0 where both are 0. Subtracts the logits themselves first where their offsets are near, since
    the difference of near-equal numbers is exact, and the shifted ones where the offsets are far apart."""
    shift = teacher.top - student.top
    near = shift.abs() <= 4
    teacher_logits = teacher.logits - teacher.top.masked_fill(near, 0.0)
    student_logits = student.logits - student.top.masked_fill(near, 0.0)
    d = (
        (teacher_logits - student_logits)
        - shift.masked_fill(~near, 0.0)
        - (teacher.log_rest - student.log_rest).to(shift.dtype)
    )
    return d.masked_fill(teacher.logits.isneginf() & student.logits.isneginf(), 0.0)


def phi(d: Tensor) -> Tensor:
    """Return exp(-d) + d - 1 >= 0: the series where expm1(-d) + d would cancel."""
    cut = 0.25 if d.dtype == torch.float32 else 0.01
    close = d.abs() < cut
    x = d.masked_fill(~close, 0.0)  # an overflow in the branch not taken would make the gradient NaN
    series = 1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x / 5040))))
    return torch.where(close, x * x * series, torch.expm1(-d) + d)


def kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Return non-negative terms whose sum is KL(p || q), d = log p - log q; p = 0 gives q, p > 0 = q gives inf."""
    far = (q - p + p * d).masked_fill(d == -torch.inf, 0.0) + q.masked_fill(d != -torch.inf, 0.0)
    return torch.where(d.abs() <= 1, p * phi(d), far.masked_fill(d == torch.inf, torch.inf))


class Mixture(NamedTuple):
    """m = (1 - beta) p_S + beta p_T, its log-ratios and relative excesses, each accurate near p_S = p_T."""

    m: Tensor
    teacher_d: Tensor
    student_d: Tensor
    teacher_excess: Tensor
    student_excess: Tensor


def mixture(p_teacher: Tensor, p_student: Tensor, d: Tensor, beta: float) -> Mixture:
    """Return teacher_d = log p_T - log m, student_d = log p_S - log m, teacher_excess = p_T / m - 1, student_excess = p_S / m -
    1.

    With e = expm1(-|d|) and `less` the weight of the smaller side in m, m is `share` = 1 + less e times the larger probability;
    below 1/2 it is added up from both weights, since 1 + less e would cancel.
    """
    e = torch.expm1(-d.abs())
    smaller_is_teacher = d <= 0
    less = torch.where(smaller_is_teacher, d.new_tensor(beta), d.new_tensor(1.0 - beta))
    more = torch.where(smaller_is_teacher, d.new_tensor(1.0 - beta), d.new_tensor(beta))
    mild = less * e >= -0.5
    share = torch.where(mild, 1 + less * e, more + less * torch.exp(-d.abs()))
    larger_d = -torch.where(mild, torch.log1p(less * e), share.log())
    smaller_d = larger_d - d.abs()
    larger_excess, smaller_excess = -less * e / share, more * e / share
    return Mixture(
        (1.0 - beta) * p_student + beta * p_teacher,
        torch.where(smaller_is_teacher, smaller_d, larger_d),
        torch.where(smaller_is_teacher, larger_d, smaller_d),
        torch.where(smaller_is_teacher, smaller_excess, larger_excess),
        torch.where(smaller_is_teacher, larger_excess, smaller_excess),
    )
