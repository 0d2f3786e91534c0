"""What an objective returns."""

from dataclasses import dataclass

from torch import Tensor

from topd.branching.windows import Windows
from topd.near_future.transport import Transport
from topd.objectives.diagnostics import Totals
from topd.scores import TokenScores


@dataclass(frozen=True, eq=False)
class NearFuture:
    """What TOPD saw beyond its candidates.

    Attributes:
        windows: of both models, one at each candidate.
        transport: between them.
        divergent: [m] bool, the real divergent points; the other candidates are false alarms.
        score: [B, T], by which candidates were chosen.
    """

    windows: Windows
    transport: Transport
    divergent: Tensor
    score: Tensor


@dataclass(frozen=True, eq=False)
class Objective:
    """A step's loss.

    Attributes:
        loss: scalar, nats; differentiable in the student.
        metrics: float tensors without a gradient, by name.
        scores: TokenScores [B, T], or [N] of a packed batch; column t is about token input_ids[:, t], 0 outside the responses.
            NaN or None where a teacher known by its top-k leaves it open (`topd.OPD`).
        totals: sums over the response tokens, from which the diagnostics among the metrics follow. Where a step has several
            micro-batches or processes, add these up, `totals.plus(other)` and `Totals.of_processes`, and then take
            `totals.metrics()`: a percentile or a perplexity is no mean of those of its parts. Trainers of topd do so.
        near_future: of TOPD; None of the other methods.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    scores: TokenScores
    totals: Totals
    near_future: NearFuture | None = None
