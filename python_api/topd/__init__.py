"""topd: on-policy distillation losses from hidden states, without full-vocabulary logits.

TOPD here is Trajectory-aware On-Policy Distillation (arXiv 2606.00305).
"""

import importlib.metadata

import topd.ops.linear_divergence.op
import topd.ops.linear_logprobs.op
import topd.ops.topk_logprobs.op  # noqa: F401  (all three register their ops)
from topd.backends import Backend, backends
from topd.branching.windows import Windows, sample_windows, window_hidden
from topd.divergences import JSD, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, TotalVariation
from topd.head import Head, LowRank
from topd.losses.entropy_aware import entropy_aware_opd
from topd.losses.linear_divergence import linear_divergence
from topd.losses.linear_logprobs import linear_logprobs
from topd.losses.next_token_mask import next_token_mask
from topd.losses.pad_topk import pad_topk
from topd.losses.plan import Plan, plan
from topd.losses.sampled import sampled_kl
from topd.losses.score_tokens import score_tokens
from topd.losses.soft_targets import soft_target_kl
from topd.losses.topk_divergence import topk_divergence
from topd.losses.topk_logprobs import topk_logprobs
from topd.models.hidden_states import hidden_states
from topd.near_future.candidates import select_candidates
from topd.near_future.false_alarms import false_alarm_weights
from topd.near_future.gate import divergent
from topd.near_future.guidance import guidance_kl
from topd.near_future.transport import Transport, near_future_divergence
from topd.objectives.config import OPDConfig, OPSDConfig, TOPDConfig, TRDConfig
from topd.objectives.objective import NearFuture, Objective
from topd.objectives.opd import OPD
from topd.objectives.opsd import OPSD
from topd.objectives.pairs import pair
from topd.objectives.topd import TOPD
from topd.objectives.trd import TRD
from topd.profiling.block import Profile
from topd.profiling.profile import profile
from topd.scores import TokenScores
from topd.vocab_shard import VocabShard

__all__ = [
    "JSD",
    "OPD",
    "OPSD",
    "TOPD",
    "TRD",
    "Backend",
    "Divergence",
    "ForwardKL",
    "Head",
    "LowRank",
    "NearFuture",
    "OPDConfig",
    "OPSDConfig",
    "Objective",
    "Plan",
    "Profile",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TOPDConfig",
    "TRDConfig",
    "TokenScores",
    "TotalVariation",
    "Transport",
    "VocabShard",
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
    "pair",
    "plan",
    "profile",
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
