"""topd: on-policy distillation losses from hidden states, without full-vocabulary logits.

TOPD here is Trajectory-aware On-Policy Distillation (arXiv 2606.00305).
"""

import importlib.metadata

import topd.ops.linear_divergence
import topd.ops.linear_logprobs
import topd.ops.topk_logprobs  # noqa: F401  (all three register their ops)
from topd.backends import Backend, backends
from topd.divergences import JSD, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, TotalVariation
from topd.entropy_aware import entropy_aware_opd
from topd.functional import linear_divergence, score_tokens
from topd.head import Head, LowRank
from topd.logprobs import linear_logprobs, topk_logprobs
from topd.models.hidden_states import hidden_states
from topd.near_future import Transport, guidance_kl, near_future_divergence
from topd.objectives.config import OPDConfig, TOPDConfig
from topd.objectives.objective import NearFuture, Objective
from topd.objectives.opd import OPD
from topd.objectives.topd import TOPD
from topd.sampled import sampled_kl
from topd.scores import TokenScores
from topd.selection import divergent, false_alarm_weights, select_candidates
from topd.server_answers import pad_topk
from topd.shift import next_token_mask
from topd.soft_targets import soft_target_kl, topk_divergence
from topd.windows import Windows, sample_windows, window_hidden

__all__ = [
    "JSD",
    "OPD",
    "TOPD",
    "Backend",
    "Divergence",
    "ForwardKL",
    "Head",
    "LowRank",
    "NearFuture",
    "OPDConfig",
    "Objective",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TOPDConfig",
    "TokenScores",
    "TotalVariation",
    "Transport",
    "Windows",
    "backends",
    "divergent",
    "entropy_aware_opd",
    "false_alarm_weights",
    "guidance_kl",
    "hidden_states",
    "linear_divergence",
    "linear_logprobs",
    "near_future_divergence",
    "next_token_mask",
    "pad_topk",
    "sample_windows",
    "sampled_kl",
    "score_tokens",
    "select_candidates",
    "soft_target_kl",
    "topk_divergence",
    "topk_logprobs",
    "window_hidden",
]


def _version() -> str:
    try:
        return importlib.metadata.version("topd")
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return "0+source"


__version__ = _version()


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
