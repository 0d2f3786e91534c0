"""The rows of the experiment: a method and its options each, on topd's objectives.

A row's objective is called with the batch and with which of its tokens are surface alone (the task's oracle). Only the oracle's
rows use that; for the others it is read afterwards, to say how often the gate was right.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import topd
from topd.objectives.gating import Verdict

Step = Callable[[Mapping[str, Tensor], Tensor, torch.Generator], topd.Objective]

# What fits answers of 31 tokens, in place of defaults that are made for thousands: 3 candidates an answer, windows of 12.
CANDIDATES, HORIZON = 0.1, 12
# What may mend the guidance: a plan that sends each of the teacher's tokens to about one place, and fewer places.
SHARP, SHORT = 0.01, 5


@dataclass(frozen=True)
class Row:
    """A method with its options.

    Attributes:
        name: on the command line and in the results.
        text: what it is, in a few words.
        config: which objective and its options.
        oracle: whether the task's oracle decides, in the gate's place, which candidates are false alarms.
        weights: "own", those of the objective; "low", the false alarms' loss is capped at the median; "high", the same weights
            lie on as many candidates of the highest distance.
    """

    name: str
    text: str
    config: topd.OPDConfig
    oracle: bool = False
    weights: str = "own"

    @property
    def near_future(self) -> topd.TOPDConfig | None:
        """The options of TOPD; None where the row is OPD alone."""
        return self.config if isinstance(self.config, topd.TOPDConfig) else None


def _topd(**options: Any) -> topd.TOPDConfig:
    return topd.TOPDConfig(**{"candidate_value": CANDIDATES, "horizon": HORIZON, **options})


_WEIGHED = _topd(guidance_weight=0.0)
_COUNTERFACTUAL = {"student_window": "rollout", "window_noise": "counterfactual"}

ROWS = {
    row.name: row
    for row in (
        Row("opd", "OPD, reverse KL", topd.OPDConfig()),
        Row("opd_forward", "OPD, forward KL", topd.OPDConfig(divergence="forward_kl")),
        Row("opd_jsd", "OPD, JSD", topd.OPDConfig(divergence="jsd")),
        Row("low_ot", "Low-OT capped", _WEIGHED, weights="low"),
        Row("high_ot", "Matched High-OT capped", _WEIGHED, weights="high"),
        Row("oracle_cap", "surface capped, by the oracle", _WEIGHED, oracle=True, weights="low"),
        Row("topd_0.05", "TOPD, lambda 0.05", _topd(guidance_weight=0.05)),
        Row("topd", "TOPD, lambda 0.1", _topd()),
        Row("topd_0.3", "TOPD, lambda 0.3", _topd(guidance_weight=0.3)),
        Row("topd_1", "TOPD, lambda 1", _topd(guidance_weight=1.0)),
        Row("rollout", "TOPD, rollout windows", _topd(student_window="rollout")),
        Row("shared", "TOPD, shared noise", _topd(window_noise="shared")),
        Row("counterfactual", "TOPD, counterfactual noise", _topd(**_COUNTERFACTUAL)),
        Row("counterfactual_0.3", "TOPD, counterfactual, lambda 0.3", _topd(guidance_weight=0.3, **_COUNTERFACTUAL)),
        Row("counterfactual_1", "TOPD, counterfactual, lambda 1", _topd(guidance_weight=1.0, **_COUNTERFACTUAL)),
        Row("sharp", "TOPD, sharp plan", _topd(epsilon=SHARP)),
        Row("sharp_1", "TOPD, sharp plan, lambda 1", _topd(guidance_weight=1.0, epsilon=SHARP)),
        Row("short", "TOPD, windows of 5", _topd(horizon=SHORT)),
        Row("short_1", "TOPD, windows of 5, lambda 1", _topd(guidance_weight=1.0, horizon=SHORT)),
        Row("oracle", "TOPD, oracle gate", _topd(), oracle=True),
        Row("oracle_1", "TOPD, oracle gate, lambda 1", _topd(guidance_weight=1.0), oracle=True),
    )
}


class OracleGate(topd.TOPD):
    """TOPD whose false alarms are the candidates that the task calls surface, whatever their distance.

    This is the one place that reaches behind topd's public API: `_candidates` to learn the positions, `_gate` to decide.
    """

    surface: Tensor  # [B, T] bool, of the batch at hand
    positions: Tensor

    def _candidates(self, *args: Any, **options: Any) -> Tensor:
        self.positions = super()._candidates(*args, **options)
        return self.positions

    def _gate(self, *args: Any, **options: Any) -> Verdict:
        row, column = self.positions.unbind(-1)
        real = ~self.surface[row, column]
        return Verdict(real, real.numel(), real.sum())


def objective_of(row: Row, student: Any, teacher: Any) -> Step:
    """Return a row's objective, which calls with a batch, its surface tokens [B, T] bool and the generator of its windows."""
    config = row.near_future
    if config is None:
        opd = topd.OPD(student, teacher, row.config)
        return lambda batch, surface, generator: opd(batch)
    near = (OracleGate if row.oracle else topd.TOPD)(student, teacher, config)

    def step(batch: Mapping[str, Tensor], surface: Tensor, generator: torch.Generator) -> topd.Objective:
        if isinstance(near, OracleGate):
            near.surface = surface
        return near(batch, generator=generator)

    return step if row.weights == "own" else _weighed(row, step, topd.OPD(student, teacher))


def _weighed(row: Row, near: Step, opd: topd.OPD) -> Step:
    """Return OPD whose false alarms weigh less: TOPD looks first, without a gradient, and tells which they are."""

    def step(batch: Mapping[str, Tensor], surface: Tensor, generator: torch.Generator) -> topd.Objective:
        with torch.no_grad():
            look = near(batch, surface, generator)
        assert look.near_future is not None
        objective = opd({**batch, "token_weights": weights_of(row.weights, look, batch["response_mask"])})
        return replace(objective, near_future=look.near_future)

    return step


def weights_of(kind: str, look: topd.Objective, response: Tensor) -> Tensor:
    """Return what each token weighs, [B, T]: at false alarms the loss is capped at its answer's median; kind "high" hands the
    same weights to as many candidates of the highest distance."""
    near = look.near_future
    assert near is not None
    positions, loss = near.windows.positions, look.scores.reverse_kl
    low = topd.false_alarm_weights(loss, positions, near.divergent, mask=response, mode="cap")
    if kind == "low":
        return low
    row, column = positions.unbind(-1)
    alarms = low[row, column][~near.divergent]
    highest = near.transport.distance.argsort(descending=True, stable=True)[: alarms.numel()]
    weights = torch.ones_like(low)
    weights[row[highest], column[highest]] = alarms
    return weights
