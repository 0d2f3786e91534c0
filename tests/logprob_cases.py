"""Random problems of topd.linear_logprobs, with their truth and what topd says.

The truth is torch's log_softmax, gather and products of them in float64, with autograd's gradients; at the tensors' own dtypes
the same is the yardstick.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from compare import TENSORS, Model, Outcome, gradients, random_model
from torch import Tensor

import topd

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": -0.3},
    "softcap": {"softcap": 5.0},
    "bias": {"bias": True},
    "adapter": {"rank": 3},
    "mask": {"mask": True},
    "everything": {"bias": True, "rank": 3, "softcap": 8.0, "scale": 0.8, "temperature": 1.6, "mask": True},
}


@dataclass(frozen=True)
class Problem:
    """The arguments of `topd.linear_logprobs` that its value depends on."""

    model: Model
    ids: Tensor
    temperature: float = 1.0
    mask: Tensor | None = None
    entropy: bool = True

    def to(self, *where: Any) -> "Problem":
        """Return it on another device or, for what is floating, in another dtype."""
        device = {} if isinstance(where[0], torch.dtype) else {"ids": self.ids.to(*where)}
        if device and self.mask is not None:
            device["mask"] = self.mask.to(*where)
        return replace(self, model=self.model.to(*where), **device)

    def upstream(self) -> Tensor:
        """Return random gradients, for the log-probabilities and, in a last column, for the entropy."""
        return torch.randn(*self.ids.shape[:-1], self.ids.shape[-1] + self.entropy, dtype=torch.float64).to(self.ids.device)


def random_problem(options: dict[str, Any], *, n: int = 11, m: int = 3, vocab: int = 41, entropy: bool = True) -> Problem:
    """Return a problem with the options of one entry of OPTIONS. Masked rows have ids of -100; the first row repeats one id."""
    of_model = {name: value for name, value in options.items() if name not in ("temperature", "mask")}
    model, ids, mask = random_model(n, vocab, 7, **of_model), torch.randint(vocab, (n, m)), None
    ids[:1] = ids[:1, :1]
    if "mask" in options:
        mask = torch.rand(n) < 0.6
        ids[~mask] = -100
    return Problem(model, ids, options.get("temperature", 1.0), mask, entropy)


def plain(
    problem: Problem,
    upstream: Tensor | None = None,
    *,
    trainable: tuple[str, ...] = TENSORS,
    dtype: torch.dtype | None = torch.float64,
) -> Outcome:
    """Return the truth in float64, the yardstick with dtype=None. The value has the entropy in a last column."""
    model, mask = problem.model.leaves(trainable, dtype), problem.mask
    rows = torch.ones_like(problem.model.hidden[..., 0], dtype=torch.bool) if mask is None else mask
    logits = replace(model, hidden=model.hidden[rows]).logits()
    logprobs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / problem.temperature).log_softmax(-1)
    columns = logprobs.gather(-1, problem.ids[rows])
    if problem.entropy:
        entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0.0)).sum(-1, keepdim=True)
        columns = torch.cat([columns, entropy], -1)
    value = columns.new_zeros(*rows.shape, columns.shape[-1]).index_put((rows,), columns)
    return Outcome(value.detach(), gradients(value, upstream, model))


def run(problem: Problem, model: Model, backend: str, **options: Any) -> Tensor:
    """Return what `plain` calls the value, through topd."""
    settings = {"temperature": problem.temperature, "mask": problem.mask, "return_entropy": problem.entropy, "backend": backend}
    value = topd.linear_logprobs(model.hidden, model.head(), problem.ids, **(settings | options))
    return torch.cat([value[0], value[1].unsqueeze(-1)], -1) if problem.entropy else value


def by_topd(
    problem: Problem, backend: str, upstream: Tensor | None = None, *, trainable: tuple[str, ...] = TENSORS, **options: Any
) -> Outcome:
    model = problem.model.leaves(trainable)
    value = run(problem, model, backend, **options)
    return Outcome(value.detach(), gradients(value, upstream, model))
