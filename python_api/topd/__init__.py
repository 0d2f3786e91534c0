"""topd: on-policy distillation losses from hidden states, without full-vocabulary logits.

TOPD here is Trajectory-aware On-Policy Distillation (arXiv 2606.00305).
"""

import topd.ops.divergence_rows
import topd.ops.linear_divergence  # noqa: F401  (both register their ops)
from topd.backends import Backend, backends
from topd.divergences import JSD, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, TotalVariation
from topd.functional import linear_divergence, score_tokens
from topd.head import Head, LowRank
from topd.scores import TokenScores

__all__ = [
    "JSD",
    "Backend",
    "Divergence",
    "ForwardKL",
    "Head",
    "LowRank",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TokenScores",
    "TotalVariation",
    "backends",
    "linear_divergence",
    "score_tokens",
]
