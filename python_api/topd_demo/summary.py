"""The numbers that a run ends with, for the terminal's table and the report's."""

import statistics
from dataclasses import dataclass

from topd_demo.evaluation import Transcript
from topd_demo.figures import NAMES
from topd_demo.loss_cost import LossCost
from topd_demo.training import Run
from topd_demo.wording import collapse, held, warning

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
    """The tables that a run ends with, and what is answered.

    Attributes:
        samples: each held-out prompt with the answers to it, by name.
        repeats: one line: how much the answers repeat themselves.
        warnings: a sentence for each method after which the answers are collapsed.
        held: one sentence on the methods after which they are not; empty where there are none.
    """

    outcome: Table
    samples: list[tuple[str, dict[str, str]]]
    wordings: Table
    repeats: str
    warnings: list[str]
    held: str
    stages: Table
    loss: Table | None


def summarise(runs: list[Run], cost: LossCost | None) -> Summary:
    """Sum up everything that was done so far."""
    shown = [run for run in runs if run.before is not None]
    said = _transcripts(shown)
    reasons = _collapses(shown)
    repeats = ", ".join(f"{name} {each.wording.repeated:.0%}" for name, each in said.items())
    return Summary(
        _outcome(shown),
        _samples(said),
        _wordings(said),
        f"Repeated 3-grams: {repeats}",
        _warnings(reasons),
        held([name for name, reason in reasons.items() if not reason]),
        stages(shown),
        None if cost is None else _loss(cost),
    )


def _transcripts(runs: list[Run]) -> dict[str, Transcript]:
    """Return what the student answers before and after each method, and the teacher, by name."""
    if not runs:
        return {}
    start = runs[0].before
    after = {f"after {NAMES[run.method]}": run.after.student for run in runs}
    return {"before": start.student, **after, "teacher": start.teacher}


def _samples(said: dict[str, Transcript]) -> list[tuple[str, dict[str, str]]]:
    """Return each prompt with its answers."""
    rows = zip(*(each.samples for each in said.values()), strict=True)
    return [(row[0][0], {name: answer for name, (_, answer) in zip(said, row, strict=True)}) for row in rows]


def _wordings(said: dict[str, Transcript]) -> Table:
    """Return how the answers are worded."""
    header = ("answers", "repeated 3-grams", "distinct tokens", "mean length", "ended by themselves", "teacher's perplexity")
    rows: list[tuple[str, ...]] = []
    for name, transcript in said.items():
        each = transcript.wording
        shares = f"{each.repeated:.0%}", f"{each.distinct:.0%}", f"{each.length:.1f}", f"{each.ended:.0%}"
        perplexity = "-" if each.teacher_perplexity is None else f"{each.teacher_perplexity:.1f}"
        rows.append((name, *shares, perplexity))
    return header, rows


def _collapses(runs: list[Run]) -> dict[str, str]:
    """Return how the student's answers after each method have collapsed, by its name; empty where they have not."""
    return {NAMES[run.method]: collapse(run.after.student.wording, run.before.teacher.wording) for run in runs}


def _warnings(reasons: dict[str, str]) -> list[str]:
    """Return a sentence for each method after which the student's answers are collapsed."""
    return [warning(name, reason, "reverse KL") for name, reason in reasons.items() if reason]


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
