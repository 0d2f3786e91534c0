"""A probe's picture: loss against distance, one panel an arm."""

from typing import TYPE_CHECKING

import numpy as np

from quality.probe_distances import Points
from quality.probe_file import Probe
from quality.probe_points import CLASSES
from quality.probe_report import title
from quality.probe_windows import ARMS
from topd.plots import FAINT, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = dict(zip(CLASSES, PALETTE[:3], strict=True))
LABELS = {"high": "high loss", "random": "random", "low": "low loss"}
LEAST = 1e-5  # nats: what lies below is drawn there


def scatter(probe: Probe, points: Points) -> "Figure":
    """Draw every point, in the colour of its class, with its class' median distance as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.3), dpi=90, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(ARMS), sharex=True, sharey=True)
    loss = points.loss.clip(LEAST)
    for panel, arm in zip(panels, ARMS, strict=True):
        for name, color in COLORS.items():
            chosen = points.of_class(name)
            distance = points.distance[arm][chosen, -1]
            style = {"color": color, "markersize": 3, "markeredgewidth": 0, "alpha": 0.45}
            panel.plot(loss[chosen], distance, "o", label=LABELS[name], **style)
            panel.axhline(float(np.median(distance)), color=color, linewidth=1.2)
        panel.set_xscale("log")
        panel.set_title(arm, fontsize=10, loc="left", color=INK)
        panel.set_xlabel("teacher NLL of the token, nats", color=INK, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FAINT)
        panel.tick_params(colors=INK, labelsize=8)
    panels[0].set_ylabel("near-future distance $D_{\\mathrm{OT}}$", color=INK)
    panels[0].legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper left")
    figure.suptitle(f"{title(probe)}; lines are medians", fontsize=11, color=INK)
    return figure
