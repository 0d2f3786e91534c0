"""TOPD's gate: which candidates really diverge. The others are false alarms."""

import math
from typing import get_args

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_rule_value, check_tensor, choice, refuse_nan
from topd.options import GateRule

GATE_RULES: tuple[str, ...] = get_args(GateRule)
UPPER_QUARTILE = 0.75
# The value of each rule where none is given; None: it must be given.
GATE_VALUES: dict[str, float | None] = {
    "lowest_fraction_out": 0.3,
    "threshold": None,
    "mean_plus_std": 1.0,
    "running_quantile": 0.3,
    "low_loss_q3": UPPER_QUARTILE,
}
# What the rules that compare with other distances compare with.
REFERENCES = {
    "running_quantile": "the distances of the last candidates, these among them",
    "low_loss_q3": "the distances at low-loss tokens",
}


def check_gate(option: str, rule: object, name: str, value: float | None) -> float:
    """Check a rule of the gate and the value that goes with it, and return the value.

    Args:
        option, name: the arguments that hold them, for the message.
        value: None: the rule's default.
    """
    chosen = choice(option, rule, GATE_RULES)
    if chosen == "low_loss_q3" and value is not None:
        raise ValueError(
            f'{name} must be left out where {option} is "low_loss_q3", which is the upper quartile, got {value!r}; for another '
            f'bound take {option}="threshold"'
        )
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
            where that is the 0-th; "low_loss_q3", distance > the upper quartile of reference (linear interpolation, as
            torch.quantile), all where reference is empty.
        value: a fraction in [0, 1], None: 0.3 (of 3 candidates or fewer none goes out); a finite number, required; a finite
            number, None: 1.0; of "running_quantile" as of "lowest_fraction_out"; of "low_loss_q3" None.
        reference: [r], in the dtype of distance and finite, with the last two rules alone: the distances of the last
            candidates, these among them; the distances at low-loss tokens.

    Returns:
        [m] bool.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, range or option; no value for "threshold"; a NaN distance; a
            reference where the rule has none, or none where it has one.

    Source: arXiv 2606.00305, which asks for a high distance and gives no rule: all five are our choice; 0.3 and the quartile
    follow its 29.23 % of high-loss tokens whose distance is under the upper quartile of the low-loss ones.
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
    if rule == "low_loss_q3":
        dtype = torch.promote_types(distance.dtype, torch.float32)  # torch.quantile takes no 16 bits
        return distance.to(dtype) > others.to(dtype).quantile(bound) if others.numel() else ~distance.isnan()
    out = goes_out(bound, others.numel())
    return distance > others.sort().values[out - 1] if out else ~distance.isnan()


def _check_reference(rule: str, reference: object, distance: Tensor) -> Tensor:
    """Check the distances that a rule compares with, and return them; of a rule without them none."""
    if rule not in REFERENCES:
        if reference is not None:
            raise ValueError(f'reference must be left out where rule is "{rule}", which compares with none, got one')
        return distance[:0]
    if reference is None:
        raise ValueError(f'reference must be given where rule is "{rule}", got None; it is {REFERENCES[rule]}, [r]')
    others = check_tensor("reference", reference, dtype=distance.dtype, device=(distance.device, "distance"))
    if others.dim() != 1:
        raise ValueError(f"reference must be [r], got {list(others.shape)}; flatten it")
    refuse_nan("reference", others, None, "leave such a distance out")
    return others
