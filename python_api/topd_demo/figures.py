"""The report's pictures: the losses' curves, and one pair of windows with its plan."""

from typing import TYPE_CHECKING, Any

from topd.plots import FAINT, INK, LITERAL, PALETTE, plot_window_pair
from topd_demo.training import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"opd": PALETTE[2], "topd": PALETTE[0]}
NAMES = {"opd": "OPD", "topd": "TOPD"}
RULE = "#E6E6E6"


PANELS = {
    "held_out_reverse_kl": "Held-out prompts: reverse KL",
    "opd_loss": "Training rollouts: reverse KL",
}  # a record's key, its title


def curves(runs: list[Run]) -> "Figure":
    """Draw reverse KL on the held-out prompts and the training loss, step by step."""
    return _figure(list(PANELS), runs)


def panel(key: str, runs: list[Run]) -> "Figure":
    """Draw one of the two alone."""
    return _figure([key], runs)


def _figure(keys: list[str], runs: list[Run]) -> "Figure":
    """Draw panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(keys), 3.2), dpi=150, facecolor="white", layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for run in runs:
            points = [(record["step"], record[key]) for record in run.records if key in record]
            style: dict[str, Any] = {"color": COLORS[run.method], "linewidth": 1.8, "label": NAMES[run.method]}
            if key != "opd_loss":
                style |= {"marker": "o", "markersize": 4}
            if points:
                axes.plot(*zip(*points, strict=True), **style)
        axes.set_title(PANELS[key], fontsize=11, loc="left", **LITERAL)
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel("nats per token", color=INK)
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
