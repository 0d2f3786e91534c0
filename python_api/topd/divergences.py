"""The divergences between a student's and a teacher's next-token distribution.

Each is a frozen dataclass that refuses bad parameters at creation; a name stands for the defaults, and the mapping that
dataclasses.asdict makes of one, {"name": "jsd", "beta": 0.3}, for the divergence itself. p_S is the student, p_T
the teacher, both at the call's temperature; every value is in nats except the total variation, which is a probability.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, TypeAlias

from topd.checks.values import real
from topd.options import DivergenceName


@dataclass(frozen=True)
class Divergence:
    """Base of the divergences: `name` is what the ops are told, `parameter` the one number that goes with it, and
    `parameter_name` the field that holds it."""

    name: str = field(default="", init=False, repr=False)
    parameter_name: ClassVar[str] = ""

    @property
    def parameter(self) -> float:
        """The number that the ops take; 0 where there is none."""
        return 0.0


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p_T || p_S), optionally with OPSD's clip of each vocabulary entry.

    Args:
        entry_clip: None, or c >= 0: the value is sum_v min(p_T log(p_T / p_S), c). Only the upper side is clipped, so a
            clipped value may be negative.

    Source: arXiv 2606.08432, eq. 6; the clip: arXiv 2601.18734.
    """

    name: str = field(default="forward_kl", init=False, repr=False)
    parameter_name: ClassVar[str] = "entry_clip"
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

    name: str = field(default="reverse_kl", init=False, repr=False)


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence, beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = (1 - beta) p_S + beta p_T.

    Args:
        beta: 0 < beta < 1. The ends, which other libraries give to the two KLs, are refused.
    """

    name: str = field(default="jsd", init=False, repr=False)
    parameter_name: ClassVar[str] = "beta"
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

    name: str = field(default="skew_kl", init=False, repr=False)
    parameter_name: ClassVar[str] = "alpha"
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

    name: str = field(default="skew_reverse_kl", init=False, repr=False)
    parameter_name: ClassVar[str] = "alpha"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        hint = "alpha = 0 is topd.ReverseKL(); alpha = 1 is zero everywhere"
        real("alpha", self.alpha, low=0.0, high=1.0, open_low=True, open_high=True, hint=hint)

    @property
    def parameter(self) -> float:
        return float(self.alpha)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """1/2 `sum_v |p_S - p_T|`, a probability in [0, 1]."""

    name: str = field(default="total_variation", init=False, repr=False)


BY_NAME: dict[str, Divergence] = {
    d.name: d for d in (ForwardKL(), ReverseKL(), JSD(), SkewKL(), SkewReverseKL(), TotalVariation())
}

# What a divergence may be given as: a name, an instance, or the mapping that dataclasses.asdict makes of one.
DivergenceLike: TypeAlias = DivergenceName | Divergence | Mapping[str, object]


def resolve_divergence(divergence: DivergenceLike) -> Divergence:
    """Return the divergence that a name or a mapping stands for, or the divergence itself."""
    if isinstance(divergence, Divergence):
        return divergence
    if isinstance(divergence, Mapping):
        return _from_mapping(divergence)
    if not isinstance(divergence, str):
        raise TypeError(
            "divergence must be a name, one of topd's divergences such as topd.JSD(0.5), or a mapping such as "
            f'{{"name": "jsd", "beta": 0.5}}, got {type(divergence).__name__}'
        )
    return _of_name(divergence)


def _of_name(name: str) -> Divergence:
    """Return the divergence of a name, with its defaults."""
    if name not in BY_NAME:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, BY_NAME))} or an instance, got {name!r}")
    return BY_NAME[name]


def _from_mapping(divergence: Mapping[str, object]) -> Divergence:
    """Return the divergence of a name and its parameters."""
    parameters = dict(divergence)
    name = parameters.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(
            f'divergence must have its "name" where it is a mapping, as in {{"name": "jsd", "beta": 0.5}}, got {divergence!r}'
        )
    default = _of_name(name)
    known = [each.name for each in fields(default) if each.init]
    if unknown := [key for key in parameters if key not in known]:
        takes = f"takes {', '.join(known)}" if known else "takes no parameter"
        raise ValueError(f"divergence {name!r} {takes}, got the unknown key {unknown[0]!r}; leave it out")
    return type(default)(**parameters)
