"""TOPD's gate: which candidates really diverge. The others are false alarms."""

import math
from typing import get_args

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_rule_value, check_tensor, choice, refuse_nan
from topd.options import GateRule

GATE_RULES: tuple[str, ...] = get_args(GateRule)
# The value of each rule where none is given; None: it must be given.
GATE_VALUES: dict[GateRule, float | None] = {"lowest_fraction_out": 0.3, "threshold": None, "mean_plus_std": 1.0}


@torch.no_grad()
def divergent(distance: Tensor, *, rule: GateRule = "lowest_fraction_out", value: float | None = None) -> Tensor:
    """Tell which candidates really diverge: those whose near-future distance is high too. The others are false alarms.

    Args:
        distance: [m] floating, of all of the batch's candidates. Not NaN: checked on the CPU; on a GPU, where a check would
            stall it, its place under "lowest_fraction_out" is undefined, and the other rules call it no divergence.
        rule: "lowest_fraction_out", all but the floor(value * m + 1e-9) lowest, of equal ones the earlier goes out first;
            "threshold", distance > value in the dtype of distance; "mean_plus_std", distance > mean + value * std, the
            population's, in float64.
        value: a fraction in [0, 1], None: 0.3 (of 3 candidates or fewer none goes out); a finite number, required; a finite
            number, None: 1.0.

    Returns:
        [m] bool.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, range or option; no value for "threshold"; a NaN distance.

    Source: arXiv 2606.00305, which asks for a high distance and gives no rule: all three are our choice; 0.3 follows its
    29.23 % of high-loss tokens whose distance is under the upper quartile of the low-loss ones.
    """
    choice("rule", rule, GATE_RULES)
    bound = check_rule_value("rule", rule, "value", GATE_VALUES[rule] if value is None else value)
    if check_tensor("distance", distance, dtype=FLOATING).dim() != 1:
        raise ValueError(f"distance must be [m], one for each candidate, got {list(distance.shape)}; flatten it")
    refuse_nan("distance", distance, None, "its windows or embeddings hold a NaN")
    if rule == "threshold":
        return distance > bound
    if rule == "mean_plus_std":
        wide = distance.double() - distance[:1].double()  # equal distances: exact zeros, so that none is above the mean
        mean = wide.mean()
        return wide > mean + bound * (wide - mean).square().mean().sqrt()
    out = math.floor(bound * distance.numel() + 1e-9)
    high = torch.ones_like(distance, dtype=torch.bool)
    high[(distance + 0.0).argsort(stable=True)[:out]] = False
    return high
