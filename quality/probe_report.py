"""A probe as markdown: the arms' tables, and a few points with their windows."""

import math
from typing import Any

import numpy as np

from quality.probe_distances import Array, Points
from quality.probe_file import Probe, Record
from quality.probe_points import CLASSES
from quality.probe_statistics import Summary, aucs, interval, repeats, resampling, stays_out, summary
from quality.probe_windows import ARMS, BASE, ROLLOUT
from topd_bench.report import machine_line, markdown_table

PAPER = ("the paper (30B teaches 4B)", "0.566", "0.361", "0.315", "29.23 %", "", "", "", "")
SHOWN = (BASE, "regenerate, shared", "rollout, counterfactual")
MARKS = str.maketrans({"\n": "↵", "\t": "⇥", "|": "¦", "`": "ˋ"})


def title(probe: Probe) -> str:
    """Return what a probe is of."""
    layers = ", ".join(map(str, sorted(probe.layers)))
    return f"Student without layers {layers}, temperature {probe.settings.temperature:g}"


def tables(probe: Probe, points: Points) -> str:
    """Return a probe's tables, with what they were made of."""
    weights = resampling(points)
    summaries = {arm: summary(points, arm, BASE, weights) for arm in ARMS}
    parts = [f"### {title(probe)}", _made_of(probe, points), _medians(summaries, probe), _areas(summaries)]
    return "\n\n".join([*parts, _by_horizon(probe, points, weights), _drawn_twice(probe, points, weights)])


def _made_of(probe: Probe, points: Points) -> str:
    """Return how many points, of what, and what the classes' losses are."""
    counts = ", ".join(f"{int(points.of_class(name).sum())} {name}" for name in CLASSES)
    losses = ", ".join(f"{np.median(points.loss[points.of_class(name)]):.2g} {name}" for name in CLASSES)
    trajectories = int(points.trajectory.max()) + 1
    settings = ", ".join(f"{name} {value:g}" for name, value in probe.settings.to_json().items())
    return (
        f"Points: {counts}, of {trajectories} trajectories ({probe.tokens:,} response tokens in all). Median loss (teacher "
        f"NLL, nats): {losses}. Settings: {settings}.\n\n{machine_line(probe.facts)}"
    )


def _medians(summaries: dict[str, Summary], probe: Probe) -> str:
    """Return the table of the paper's section 2.1."""
    header = ("arm", "D_OT high", "random", "low", "high under low's Q3", "Pearson", "Spearman", "exactly 0", "windows, s")
    rows = []
    for arm, one in summaries.items():
        medians = [f"{one.medians[name]:.3f}" for name in CLASSES]
        correlations = ["" if math.isnan(value) else f"{value:.2f}" for value in (one.pearson, one.spearman)]
        seconds = sum(probe.seconds.get(name, 0.0) for name in ARMS[arm])
        rows.append([arm, *medians, f"{one.under:.1%}".replace("%", " %"), *correlations, f"{one.zero:.0%}", f"{seconds:.0f}"])
    return markdown_table(header, [*rows, list(PAPER)])


def _areas(summaries: dict[str, Summary]) -> str:
    """Return the table of how well each arm tells high-loss tokens from the others."""
    header = ("arm", "AUC high / random", "high / low", f"above {BASE}: high / random", "high / low")
    rows = []
    for arm, one in summaries.items():
        ahead = ["" if arm == BASE else _signed(one.ahead[other]) for other in ("random", "low")]
        rows.append([arm, *(str(one.against[other]) for other in ("random", "low")), *ahead])
    return markdown_table(header, rows)


def _signed(value: Any) -> str:
    return f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"


def _by_horizon(probe: Probe, points: Points, weights: Array) -> str:
    """Return the table of AUC by the windows' tokens that are compared."""
    horizons, rows = probe.settings.horizons, []
    for arm in ARMS:
        columns = [*points.distance[arm].T, *points.later[arm].T]
        rows.append([arm, *(str(interval(aucs(points, column, "random", weights))) for column in columns)])
    spans = [*(f"1 to {horizon}" for horizon in horizons), *(f"2 to {horizon}" for horizon in horizons)]
    return markdown_table(("AUC high / random, tokens", *spans), rows)


def _drawn_twice(probe: Probe, points: Points, weights: Array) -> str:
    """Return the table of how far distances at high-loss tokens repeat where their windows are drawn once more."""
    horizons, rows = probe.settings.horizons, []
    for arm in ARMS:
        places = range(len(horizons))
        ranks = [str(interval(repeats(points, arm, place, weights))) for place in places]
        rows.append([arm, *ranks, *(f"{stays_out(points, arm, place):.0%}" for place in places)])
    spans = [*(f"Spearman, {horizon} tokens" for horizon in horizons), *(f"out twice, {horizon}" for horizon in horizons)]
    return markdown_table(("high loss, drawn twice", *spans), rows)


def examples(probe: Probe, points: Points, tokenizer: Any, count: int) -> str:
    """Return high-loss points with their windows, from the nearest to the furthest by the last of the arms shown."""
    order = np.argsort(points.distance[SHOWN[-1]][:, -1], kind="stable")
    high = order[points.of_class("high")[order]]
    chosen = sorted({round(place) for place in np.linspace(0, len(high) - 1, min(count, len(high)))})
    distances = [{arm: float(points.distance[arm][place, -1]) for arm in SHOWN} for place in high[chosen]]
    shown = [_example(probe.points[place], each, tokenizer) for place, each in zip(high[chosen], distances, strict=True)]
    return "\n\n".join([f"#### High-loss points: {title(probe)}", *shown])


def _example(point: Record, distances: dict[str, float], tokenizer: Any) -> str:
    """Return one point with its windows, and the distances of the arms shown."""

    def text(tokens: list[int]) -> str:
        return f"`{tokenizer.decode(tokens).translate(MARKS)}`"

    windows, rows = point["windows"], []
    for arm in SHOWN:
        for name in ARMS[arm]:
            rows.append([name, text(windows[name]), f"{distances[arm]:.3f}" if name == ARMS[arm][1] else ""])
    token = text(windows[ROLLOUT][:1])
    first = (
        f"Trajectory {point['trajectory']}, token {point['place']}: {token}, teacher NLL {point['teacher_nll']:.2f}, student "
        f"NLL {point['student_nll']:.2f}, after {text(point['prefix'])}"
    )
    return f"{first}\n\n{markdown_table(('window', 'text', 'D_OT'), rows)}"
