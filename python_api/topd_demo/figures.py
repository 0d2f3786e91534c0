"""The report's pictures: the losses' curves, and one pair of windows with its plan."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from topd.plots import FAINT, INK, LITERAL, PALETTE, plot_window_pair
from topd_demo.training import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"opd": PALETTE[2], "topd": PALETTE[0]}
STUDENT, TEACHER = PALETTE[2], PALETTE[0]
NAMES = {"opd": "OPD", "topd": "TOPD", "trd": "TRD", "opsd": "OPSD", "context": "context"}
RULE = "#E6E6E6"

PANELS = {
    "held_out_reverse_kl": "Held-out prompts: reverse KL",
    "opd_loss": "Training rollouts: reverse KL",
}  # a record's key, its title


@dataclass(frozen=True)
class Line:
    """A line of a panel: points (step, value), with the standard error of each where they are marked and it is known."""

    label: str
    color: str
    points: list[tuple[float, float]]
    marked: bool = True
    errors: list[float] | None = None


@dataclass(frozen=True)
class Panel:
    """Lines over the steps."""

    title: str
    unit: str
    lines: list[Line]


def curves(runs: list[Run]) -> "Figure":
    """Draw reverse KL on the held-out prompts and the training loss, step by step."""
    return drawn([panel(key, runs) for key in PANELS])


def panel(key: str, runs: list[Run]) -> Panel:
    """Return one of the two alone."""
    lines = [Line(NAMES[run.method], COLORS[run.method], _points(run, key), key != "opd_loss") for run in runs]
    return Panel(PANELS[key], "nats per token", lines)


def paired_panels(run: Run, right_answers: str, teacher: str) -> list[Panel]:
    """Return the panels of a method whose teacher reads another prompt; right_answers, teacher: what they are called."""
    shares = _points(run, "held_out_right")
    errors = [standard_error(share, len(run.before.rows)) for _, share in shares] if run.before else []
    student = Line("student", STUDENT, shares, errors=errors)
    oracle = Line(teacher, TEACHER, _points(run, "held_out_teacher_right"))
    kl = Line("student", STUDENT, _points(run, "held_out_kl"))
    return [
        Panel("Held-out questions: forward KL", "nats per token", [kl]),
        Panel(f"Held-out questions: {right_answers}", "share, with its standard error", [student, oracle]),
    ]


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share of so many questions, as Agresti and Coull have it: that of 0 of 12 is not 0."""
    middle = (share * count + 2) / (count + 4)
    return math.sqrt(middle * (1 - middle) / (count + 4))


def _points(run: Run, key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in run.records if key in record]


def drawn(panels: list[Panel]) -> "Figure":
    """Draw panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(panels), 3.2), dpi=150, facecolor="white", layout="constrained")
    for axes, each in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in each.lines:
            style: dict[str, Any] = {"color": line.color, "linewidth": 1.8, "label": line.label}
            style |= {"marker": "o", "markersize": 4} if line.marked else {}
            if line.points and line.errors:
                axes.errorbar(*zip(*line.points, strict=True), yerr=line.errors, elinewidth=1.0, **style)
            elif line.points:
                axes.plot(*zip(*line.points, strict=True), **style)
        axes.set_title(each.title, fontsize=11, loc="left", **LITERAL)
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(each.unit, color=INK)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set(axisbelow=True, facecolor="none")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
        axes.tick_params(colors=INK, length=0)
        if axes.lines:
            axes.legend(frameon=False, labelcolor=INK)
    return figure


def windows(run: Run) -> "Figure | None":
    """Draw TOPD's latest pair; return None for another method."""
    pair = run.pair
    if pair is None:
        return None
    kind = "a divergent point" if pair.divergent else "a false alarm"
    title = f"Two continuations of one prefix, {kind}"
    return plot_window_pair(pair.transport(), 0, pair.student_tokens, pair.teacher_tokens, title=title)
