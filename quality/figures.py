"""Curves of accuracy over steps and over compute, a band a row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quality.methods import ROWS
from quality.statistics import paired_interval
from quality.tables import BASELINE, area_differences, by_row
from quality.training import Record
from topd.files import whole
from topd.plots import FAINT, INK, PALETTE

AXES = {"step": "on-policy steps", "flop": "floating-point operations"}


def draw(task: str, records: Sequence[Record], folder: Path) -> Path:
    """Draw a task's curves: a panel a row beside OPD, means over seeds with a band of a standard error; return the file."""
    from matplotlib.figure import Figure

    rows = by_row(records)
    others = [name for name in rows if name != BASELINE] or list(rows)
    figure = Figure(figsize=(3.0 * len(AXES), 1.9 * len(others)), dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(len(others), len(AXES), squeeze=False, sharey=True)
    for line, name in zip(panels, others, strict=True):
        for panel, (axis, label) in zip(line, AXES.items(), strict=True):
            if BASELINE in rows:
                _band(panel, list(rows[BASELINE].values()), axis, FAINT, "OPD")
            _band(panel, list(rows[name].values()), axis, PALETTE[2 if name == BASELINE else 0], ROWS[name].text)
            panel.set_ylim(0, 1)
            panel.grid(color="#E6E6E6", linewidth=0.6)
            panel.tick_params(labelsize=7)
            panel.set_xlabel(label, fontsize=7)
        line[0].set_title(ROWS[name].text, fontsize=8, loc="left")
    figure.suptitle(f"{task}: accuracy on held-out problems", fontsize=9)
    return _saved(figure, folder / f"{task}.png")


def draw_differences(by_task: Mapping[str, Sequence[Record]], path: Path) -> Path:
    """Draw each row's area over steps minus OPD's with its interval, a panel a task; return the file."""
    from matplotlib.figure import Figure

    rows_of = {task: by_row(records) for task, records in by_task.items()}
    names = [name for name in ROWS if name != BASELINE and any(name in rows for rows in rows_of.values())]
    figure = Figure(
        figsize=(3.4 + 2.3 * len(by_task), 0.6 + 0.23 * len(names)), dpi=110, layout="constrained", facecolor="white"
    )
    panels = figure.subplots(1, len(by_task), squeeze=False, sharey=True)[0]
    for panel, (task, rows) in zip(panels, rows_of.items(), strict=True):
        for place, name in enumerate(names):
            mean, low, high = paired_interval(area_differences(rows.get(name, {}), rows.get(BASELINE, {})))
            color = FAINT if not (low > 0 or high < 0) else PALETTE[1 if low > 0 else 0]
            panel.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
            panel.plot([mean], [place], "o", color=color, markersize=4)
        panel.axvline(0, color=INK, linewidth=0.8)
        panel.set_title(task, fontsize=9)
        panel.set_xlabel("area over steps minus OPD's", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(axis="x", color="#E6E6E6", linewidth=0.6)
    panels[0].set_yticks(range(len(names)), [ROWS[name].text for name in names])
    panels[0].invert_yaxis()
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    with whole(path) as unfinished:
        figure.savefig(unfinished, format="png")
    return path


def _band(panel: Any, runs: list[Record], axis: str, color: str, label: str) -> None:
    """Draw the mean of some runs and the band of its standard error; steps are the same in all, operations nearly so."""
    places = np.mean([[point[axis] for point in run["curve"]] for run in runs], axis=0)
    values = np.array([[point["accuracy"] for point in run["curve"]] for run in runs])
    mean = values.mean(0)
    panel.plot(places, mean, color=color, linewidth=1.4, label=label)
    if len(runs) > 1:
        error = values.std(0, ddof=1) / len(runs) ** 0.5
        panel.fill_between(places, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
