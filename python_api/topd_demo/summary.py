"""The numbers that a run ends with, for the terminal's table and the report's."""

import statistics
from dataclasses import dataclass

from topd_demo.figures import NAMES
from topd_demo.loss_cost import LossCost
from topd_demo.training import Run

STAGES = {
    "rollouts": "student's rollouts",
    "student_forward": "student's pass",
    "teacher_forward": "teacher's pass",
    "divergence": "divergence",
    "student_windows": "student's windows",
    "teacher_windows": "teacher's windows",
    "transport": "transport",
    "window_forward": "pass over the windows",
    "guidance": "guidance",
    "backward": "backward pass",
    "optimizer": "optimizer",
    "step": "a whole step",
}
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # header, rows


@dataclass(frozen=True)
class Summary:
    """The tables that a run ends with."""

    outcome: Table
    stages: Table
    loss: Table | None


def summarise(runs: list[Run], cost: LossCost | None) -> Summary:
    """Sum up everything that was done so far."""
    shown = [run for run in runs if run.before is not None]
    return Summary(_outcome(shown), stages(shown), None if cost is None else _loss(cost))


def _outcome(runs: list[Run]) -> Table:
    """Return what each method reached."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        assert run.before is not None
        assert run.after is not None
        first, last = run.before.reverse_kl, run.after.reverse_kl
        steps = [record for record in run.records if "loss" in record]
        minutes = sum(record["seconds_step"] for record in steps) / 60
        rows.append(
            (NAMES[run.method], str(run.done), f"{first:.2f}", f"{last:.2f}", f"{last / first - 1:+.0%}", f"{minutes:.1f} min")
        )
    return ("method", "steps", "before", "after", "change", "training"), rows


def stages(runs: list[Run]) -> Table:
    """Return where a step's time goes."""
    rows = []
    for key, name in STAGES.items():
        cells = [_median(run, f"seconds_{key}") for run in runs]
        if any(cell != "-" for cell in cells):
            rows.append((name, *cells))
    return ("seconds, median", *(NAMES[run.method] for run in runs)), rows


def _median(run: Run, key: str) -> str:
    """Return the median over a run's records."""
    values = [record[key] for record in run.records if key in record]
    return f"{statistics.median(values):.2f}" if values else "-"


def _loss(cost: LossCost) -> Table:
    """Return what the loss costs."""

    def mib(value: float | None) -> str:
        return "not measured" if value is None else f"{value:,.0f} MiB"

    rows: list[tuple[str, ...]] = [
        ("topd", f"{cost.seconds:.2f} s", mib(cost.peak_mib)),
        ("eager", f"{cost.eager_seconds:.2f} s", mib(cost.eager_peak_mib)),
    ]
    return (f"loss of {cost.tokens} tokens x {cost.vocab:,}", "time", "peak memory"), rows
