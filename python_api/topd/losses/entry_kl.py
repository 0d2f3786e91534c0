"""The KL between two distributions of which each row holds a few log-probabilities, computed in float64.

Over all entries the KL is a sum of non-negative terms, p (log p - log q) - p + q. Soft targets and a top-k name only some of
the tokens: one more entry, the bucket, then holds the mass of all others. Near equality the errors of the log-probabilities
count only to second order that way, and no value is negative.
"""

import torch
from torch import Tensor

from topd.ops.shared.row_math import phi


def entries_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum of p (log p - log q) - p + q over the last dimension, no term of which is negative.

    Entries may be -inf: p = 0 gives q, and q = 0 < p makes the row inf, without a gradient.
    """
    p, q = log_p.exp(), log_q.exp()
    d, impossible = _log_ratio(log_p, log_q)
    close = (d.abs() <= 1) & ~(log_p.isneginf() | log_q.isneginf())
    terms = torch.where(close, p * phi(d.masked_fill(~close, 0.0)), p * d - p + q)
    return _sum(terms, impossible)


def plain_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum of p (log p - log q), which has either sign where p and q hold different mass."""
    d, impossible = _log_ratio(log_p, log_q)
    return _sum(log_p.exp() * d, impossible)


def with_bucket(logs: Tensor, last: Tensor) -> Tensor:
    """Return each row [..., M] with one more entry, [...], behind it."""
    return torch.cat([logs, last.unsqueeze(-1)], -1)


def renormalised(logprobs: Tensor) -> Tensor:
    """Return log-probabilities among the chosen tokens alone; a row without any stays -inf."""
    nothing = logprobs.isneginf().all(-1, keepdim=True)
    return (logprobs - logprobs.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True)).masked_fill(nothing, -torch.inf)


def zero_masked(value: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the rows' values in a dtype, 0 where the mask is False."""
    value = value.to(dtype)
    return value if mask is None else value.masked_fill(~mask, 0.0)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p - log q, 0 and without a gradient where either is -inf, and where p > 0 = q."""
    absent = log_p.isneginf() | log_q.isneginf()
    return (log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)), ~log_p.isneginf() & log_q.isneginf()


def _sum(terms: Tensor, impossible: Tensor) -> Tensor:
    """Return each row's sum, inf and without a gradient where an entry is impossible."""
    infinite = impossible.any(-1)
    return terms.masked_fill(infinite.unsqueeze(-1), 0.0).sum(-1).masked_fill(infinite, torch.inf)
