"""What a profiled block spent, as numbers and for a reader."""

from dataclasses import asdict, dataclass
from typing import Any

from topd.memory import size_text

# What of a step is the loss: the comparison of the two models, beyond their own passes.
LOSS_STAGES = ("divergence", "guidance", "backward_divergence", "backward_guidance")
REST, BETWEEN = "rest", "objective"
WORDS = {
    "teacher_forward": "teacher's forward",
    "student_forward": "student's forward",
    "divergence": "divergence",
    "student_windows": "student's windows, sampled",
    "teacher_windows": "teacher's windows, sampled",
    "transport": "transport between the windows",
    "window_forward": "student's forward over the windows",
    "guidance": "guidance",
    BETWEEN: "rest of the objective: checks, scores, metrics",
    "backward_guidance": "backward of the guidance",
    "backward_windows": "backward of the windows' forward",
    "backward_divergence": "backward of the divergence",
    "backward_student": "student's backward",
    REST: "rest of the loop: optimizer, data",
}


@dataclass(frozen=True)
class StageTime:
    """A stage: its name, its time, how often it ran, the peak of memory while it ran (None: not known)."""

    stage: str
    seconds: float
    entered: int
    peak_mib: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything that a block spent.

    Attributes:
        objective: OPD, TOPD, TRD or OPSD.
        device: in words.
        calls, backwards: how often the objective was called, and its loss differentiated.
        tokens: response tokens in all calls.
        seconds: of the block, by the host's clock.
        stages: the block's time in parts that add up to it; on a GPU by its events.
        peak_mib, peak_source: the most memory beyond what was in use before; None where the system does not say.
        host_waits: count and seconds; None where they were not counted.
        host_waits_note: why not, or what the count holds.
        logits_bytes: float32 logits of both models at the response tokens of all calls, which were never allocated;
            `largest_logits_bytes` of the largest call.
        trace: the file of torch.profiler's trace; None: none was asked for.
    """

    objective: str
    device: str
    calls: int
    backwards: int
    tokens: int
    seconds: float
    stages: tuple[StageTime, ...]
    peak_mib: float | None
    peak_source: str
    host_waits: dict[str, float] | None
    host_waits_note: str
    logits_bytes: int
    largest_logits_bytes: int
    trace: str | None

    @property
    def timed(self) -> float:
        """Return the seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def loss_share(self) -> float:
        """Return the loss's share of the block's time: the comparison of the two models, forward and backward."""
        return share(sum(stage.seconds for stage in self.stages if stage.stage in LOSS_STAGES), self.timed)

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers by name, for JSON."""
        return asdict(self) | {"loss_share": self.loss_share, "loss_stages": list(LOSS_STAGES)}

    def __str__(self) -> str:
        if not self.calls:
            return (
                f"profile of {self.objective}: no call of the objective inside the block, nothing to report; call "
                "objective(batch), or train, inside `with topd.profile(objective)`"
            )
        lines = [
            f"profile of {self.objective} on {self.device}: {self.calls:,} calls, {self.backwards:,} backward passes, "
            f"{self.tokens:,} response tokens, {self.seconds:,.3f} s",
            "",
            *_table(self),
            "",
            f"loss          {100 * self.loss_share:.1f} % of the time ({', '.join(_loss_stages(self))})",
            f"peak memory   {_mib(self.peak_mib)}: {self.peak_source}",
            f"host waits    {_waits(self)}",
            f"no logits     {size_text(self.logits_bytes)} of float32 logits were never allocated, "
            f"{size_text(self.largest_logits_bytes)} of them in the largest call",
        ]
        return "\n".join(lines + [f"trace         {self.trace}"] * (self.trace is not None))


def share(part: float, whole: float) -> float:
    """Return a part of a whole; 0 of nothing."""
    return part / whole if whole else 0.0


def words_of(stage: str) -> str:
    """Return what a stage is, for a reader; a user's own by its name."""
    return WORDS.get(stage, stage)


def _table(report: Report) -> list[str]:
    """Return a line a stage."""
    peaks = any(stage.peak_mib is not None for stage in report.stages)
    width = max(len(words_of(stage.stage)) for stage in report.stages)
    lines = [f"{'stage':<{width}}  {'seconds':>9}  {'share':>7}  {'ms a call':>10}" + "   peak MiB" * peaks]
    for stage in report.stages:
        per_call = 1e3 * stage.seconds / report.calls
        cells = f"{stage.seconds:>9.3f}  {100 * share(stage.seconds, report.timed):>5.1f} %  {per_call:>10.2f}"
        peak = "" if stage.peak_mib is None else f"{stage.peak_mib:>11,.0f}"
        lines.append(f"{words_of(stage.stage):<{width}}  {cells}{peak}")
    return lines


def _loss_stages(report: Report) -> list[str]:
    return [words_of(stage.stage) for stage in report.stages if stage.stage in LOSS_STAGES]


def _mib(mib: float | None) -> str:
    return "not measured (the system does not say)" if mib is None else f"{mib:,.0f} MiB"


def _waits(report: Report) -> str:
    if report.host_waits is None:
        return report.host_waits_note
    waits = report.host_waits
    return f"{waits['count']:,.0f} synchronisations, {waits['seconds']:.3f} s ({report.host_waits_note})"
