"""A profiled block as a picture: one bar, a call's time by stage."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd.files import whole
from topd.plots import INK, LITERAL, PALETTE, new_figure
from topd.profiling.report import LOSS_STAGES, Report, share, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of what is not the loss.
COLORS = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#5B4B8A",
    "#C7E3D4",
    "#8C6D31",
    "#A9BCD6",
    "#E8D8A0",
)
LOSS = PALETTE[0]
LEAST_LABEL = 0.04  # of the bar: a share below it is not written into it


def figure_of(report: Report) -> "Figure":
    """Return the figure: stages from left to right as they run, those of the loss in red and hatched.

    Raises:
        ValueError: a block in which the objective was never called.
        ImportError: matplotlib is not installed.
    """
    if not report.calls:
        raise ValueError("plot must come after a block that called the objective, and this one never did")
    stages = [stage for stage in report.stages if stage.seconds > 0]
    figure = new_figure(9.0, 1.75 + 0.2 * ((len(stages) + 1) // 2))
    axes = figure.add_axes((0.03, 1 - 1.25 / figure.get_figheight(), 0.94, 0.55 / figure.get_figheight()))
    start, colors = 0.0, iter(COLORS * len(stages))
    for stage in stages:
        width, of_loss = 1e3 * stage.seconds / report.calls, stage.stage in LOSS_STAGES
        part = share(stage.seconds, report.timed)
        style: dict[str, Any] = {"color": LOSS, "hatch": "//"} if of_loss else {"color": next(colors)}
        label = f"{words_of(stage.stage)}, {_ms(width)} ms, {100 * part:.1f} %"
        axes.barh(0, width, left=start, height=1.0, edgecolor="white", linewidth=0.8, label=label, **style)
        if part >= LEAST_LABEL:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
            axes.text(start + width / 2, 0, f"{100 * part:.0f} %", ha="center", va="center", fontsize=9, bbox=box, **LITERAL)
        start += width
    axes.set(xlim=(0, start), ylim=(-0.5, 0.5), yticks=[])
    axes.set_xlabel("ms a call of the objective", color=INK)
    axes.spines[["left", "right", "top"]].set_visible(False)
    memory = "" if report.peak_mib is None else f", peak memory {report.peak_mib:,.0f} MiB"
    title = f"{report.objective}, {report.device}: the loss takes {100 * report.loss_share:.1f} % of a step{memory}"
    figure.text(0.03, 1 - 0.3 / figure.get_figheight(), title, va="center", fontsize=11, **LITERAL)
    figure.legend(loc="lower left", bbox_to_anchor=(0.025, 0.01), ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def _ms(value: float) -> str:
    """Return milliseconds in three figures, or whole from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def save_plot(report: Report, path: Path) -> None:
    """Draw a report into a file."""
    figure = figure_of(report)
    kind = path.suffix.removeprefix(".").lower() or "png"
    with whole(path) as unfinished:
        figure.savefig(unfinished, format=kind)
