"""The divergences between a student's and a teacher's next-token distribution.

Each is a frozen dataclass that refuses bad parameters at creation; a name stands for the defaults. p_S is the student, p_T
the teacher, both at the call's temperature; every value is in nats except the total variation, which is a probability.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from topd.checks import real
from topd.options import DivergenceName


@dataclass(frozen=True)
class Divergence:
    """Base of the divergences: `name` is what the ops are told, `parameter` the one number that goes with it."""

    name: ClassVar[str] = ""

    @property
    def parameter(self) -> float:
        return 0.0


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p_T || p_S), optionally with OPSD's clip of each vocabulary entry.

    Args:
        entry_clip: None, or c >= 0: the value is sum_v min(p_T log(p_T / p_S), c). Only the upper side is clipped, so a
            clipped value may be negative.

    Source: arXiv 2606.08432, eq. 6; the clip: arXiv 2601.18734.
    """

    name: ClassVar[str] = "forward_kl"
    entry_clip: float | None = None

    def __post_init__(self) -> None:
        if self.entry_clip is not None:
            real("entry_clip", self.entry_clip, low=0.0, hint="None means no clip")

    @property
    def parameter(self) -> float:
        return math.inf if self.entry_clip is None else float(self.entry_clip)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(p_S || p_T), the loss of plain on-policy distillation (arXiv 2606.00305, the OPD baseline)."""

    name: ClassVar[str] = "reverse_kl"


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence, beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = (1 - beta) p_S + beta p_T.

    Args:
        beta: 0 < beta < 1. The ends, which other libraries give to the two KLs, are refused.
    """

    name: ClassVar[str] = "jsd"
    beta: float = 0.5

    def __post_init__(self) -> None:
        hint = "for the limits use topd.ForwardKL() (beta -> 0) or topd.ReverseKL() (beta -> 1)"
        real("beta", self.beta, low=0.0, high=1.0, open_low=True, open_high=True, hint=hint)

    @property
    def parameter(self) -> float:
        return float(self.beta)


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p_T || alpha p_T + (1 - alpha) p_S).

    Args:
        alpha: 0 < alpha < 1; alpha = 0 would be the forward KL, alpha = 1 is identically 0.
    """

    name: ClassVar[str] = "skew_kl"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        hint = "alpha = 0 is topd.ForwardKL(); alpha = 1 is zero everywhere"
        real("alpha", self.alpha, low=0.0, high=1.0, open_low=True, open_high=True, hint=hint)

    @property
    def parameter(self) -> float:
        return float(self.alpha)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(p_S || alpha p_S + (1 - alpha) p_T).

    Args:
        alpha: 0 < alpha < 1; alpha = 0 would be the reverse KL, alpha = 1 is identically 0.
    """

    name: ClassVar[str] = "skew_reverse_kl"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        hint = "alpha = 0 is topd.ReverseKL(); alpha = 1 is zero everywhere"
        real("alpha", self.alpha, low=0.0, high=1.0, open_low=True, open_high=True, hint=hint)

    @property
    def parameter(self) -> float:
        return float(self.alpha)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """1/2 sum_v |p_S - p_T|, a probability in [0, 1]."""

    name: ClassVar[str] = "total_variation"


BY_NAME: dict[str, Divergence] = {
    d.name: d for d in (ForwardKL(), ReverseKL(), JSD(), SkewKL(), SkewReverseKL(), TotalVariation())
}


def resolve_divergence(divergence: DivergenceName | Divergence) -> Divergence:
    """The divergence that a name stands for, or the divergence itself."""
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence must be a name or one of topd's divergences such as topd.JSD(0.5), got {type(divergence).__name__}"
        )
    if divergence not in BY_NAME:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, BY_NAME))} or an instance, got {divergence!r}")
    return BY_NAME[divergence]
