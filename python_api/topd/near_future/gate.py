"""TOPD's gate: which candidates really diverge. The others are false alarms."""

import math
from typing import get_args

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_rule_value, check_tensor, choice, refuse_nan
from topd.options import GateRule

GATE_RULES: tuple[str, ...] = get_args(GateRule)
# The value of each rule where none is given; None: it must be given.
GATE_VALUES: dict[str, float | None] = {
    "lowest_fraction_out": 0.3,
    "threshold": None,
    "mean_plus_std": 1.0,
    "running_quantile": 0.3,
}


def check_gate(option: str, rule: object, name: str, value: float | None) -> float:
    """Check a rule of the gate and the value that goes with it, and return the value.

    Args:
        option, name: the arguments that hold them, for the message.
        value: None: the rule's default.
    """
    chosen = choice(option, rule, GATE_RULES)
    return check_rule_value(option, chosen, name, GATE_VALUES[chosen] if value is None else value)


def goes_out(value: float, count: int) -> int:
    """Return how many of so many candidates go out where a share of them does."""
    return math.floor(value * count + 1e-9)


@torch.no_grad()
def divergent(
    distance: Tensor, *, rule: GateRule = "lowest_fraction_out", value: float | None = None, reference: Tensor | None = None
) -> Tensor:
    """Tell which candidates really diverge: those whose near-future distance is high too. The others are false alarms.

    Args:
        distance: [m] floating, of all of the batch's candidates. Not NaN: checked on the CPU; on a GPU, where a check would
            stall it, its place under "lowest_fraction_out" is undefined, and the other rules call it no divergence.
        rule: "lowest_fraction_out", all but the floor(value * m + 1e-9) lowest, of equal ones the earlier goes out first;
            "threshold", distance > value in the dtype of distance; "mean_plus_std", distance > mean + value * std, the
            population's, in float64; "running_quantile", distance > the floor(value * r + 1e-9)-th lowest of reference, all
            where that is the 0-th.
        value: a fraction in [0, 1], None: 0.3 (of 3 candidates or fewer none goes out); a finite number, required; a finite
            number, None: 1.0; of "running_quantile" as of "lowest_fraction_out".
        reference: [r], in the dtype of distance, with "running_quantile" alone: the distances of the last candidates, these
            among them.

    Returns:
        [m] bool.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, range or option; no value for "threshold"; a NaN distance; a
            reference where the rule has none, or none where it has one.

    Source: arXiv 2606.00305, which asks for a high distance and gives no rule: all four are our choice; 0.3
    follows its 29.23 % of high-loss tokens whose distance is under the upper quartile of the low-loss ones.
    """
    bound = check_gate("rule", rule, "value", value)
    if check_tensor("distance", distance, dtype=FLOATING).dim() != 1:
        raise ValueError(f"distance must be [m], one for each candidate, got {list(distance.shape)}; flatten it")
    refuse_nan("distance", distance, None, "its windows or embeddings hold a NaN")
    others = _check_reference(rule, reference, distance)
    if rule == "threshold":
        return distance > bound
    if rule == "mean_plus_std":
        wide = distance.double() - distance[:1].double()  # equal distances: exact zeros, so that none is above the mean
        mean = wide.mean()
        return wide > mean + bound * (wide - mean).square().mean().sqrt()
    if rule == "lowest_fraction_out":
        high = torch.ones_like(distance, dtype=torch.bool)
        high[(distance + 0.0).argsort(stable=True)[: goes_out(bound, distance.numel())]] = False
        return high
    out = goes_out(bound, others.numel())
    return distance > others.sort().values[out - 1] if out else ~distance.isnan()


def _check_reference(rule: str, reference: object, distance: Tensor) -> Tensor:
    """Check the distances that a rule compares with, and return them; of a rule without them none."""
    if rule != "running_quantile":
        if reference is not None:
            raise ValueError(f'reference must be left out where rule is "{rule}", which compares with none, got one')
        return distance[:0]
    if reference is None:
        raise ValueError(
            f'reference must be given where rule is "{rule}", got None: distances of the last candidates, these among them'
        )
    others = check_tensor("reference", reference, dtype=distance.dtype, device=(distance.device, "distance"))
    if others.dim() != 1:
        raise ValueError(f"reference must be [r], got {list(others.shape)}; flatten it")
    refuse_nan("reference", others, None, "leave such a distance out")
    return others
