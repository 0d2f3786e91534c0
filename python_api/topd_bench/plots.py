"""Pictures of a run: times or memory over a sweep's sizes on log axes, one line a system; else bars, one group a loss and head.

matplotlib is imported when a figure is drawn, pyplot never. 7 inches wide, to be read at 700 pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from topd.files import whole
from topd.plots import FAINT, INK, PALETTE, new_figure
from topd_bench.catalogue import CASES
from topd_bench.records import MEASURED
from topd_bench.sweep import Line, lines_of, log_slope, upper_slope, value_of

ENDINGS = (".png", ".svg", ".pdf")
NAMES = {"ours": "topd", "floor": "bare products", "trl": "TRL", "liger": "Liger", "cce": "ml-cross-entropy"}
COLORS = dict(zip(("ours", "trl", "eager", "liger", "cce", "torch.compile"), PALETTE, strict=True)) | {"floor": FAINT}
HIDDEN = ("warm_floor",)
GRID = "#E6E6E6"
Rows = Sequence[Mapping[str, Any]]


def drawable(case: str) -> bool:
    """Tell whether a case has a picture: those of times or memory of losses have one."""
    return CASES[case].sweeps


def check_path(path: Path | None, case: str) -> None:
    """Check that the case has a picture and the file an ending that is known.

    Raises:
        ValueError: says what to do.
    """
    if path is None:
        return
    if not drawable(case):
        able = ", ".join(name for name in CASES if drawable(name))
        raise ValueError(f"--plot must be left out with --case {case}: the cases with a picture are {able}")
    if path.suffix not in ENDINGS:
        raise ValueError(f"--plot must end in {', '.join(ENDINGS)}, got {str(path)!r:.60}")


def draw(rows: Rows, sweep: str | None, path: Path) -> bool:
    """Write the picture; return whether there was anything to draw."""
    measured = [row for row in rows if row.get("status") == MEASURED and row["peer"] not in HIDDEN]
    if not measured:
        return False
    memory = measured[0]["case"] == "memory"
    figure = sweep_figure(measured, sweep, memory=memory) if sweep else bar_figure(measured, memory=memory)
    with whole(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:])
    return True


def name_of(peer: str) -> str:
    """Return how a peer is called in pictures."""
    return NAMES.get(peer, peer)


def sweep_figure(rows: Rows, axis: str, *, memory: bool) -> Any:
    """Draw every system's line, with its name and slope in the legend; a panel for each loss and head."""
    from matplotlib.ticker import LogLocator

    lines = lines_of(rows, axis)
    groups = list(dict.fromkeys((line.loss, line.head) for line in lines))
    figure = new_figure(7.0, 0.6 + 3.9 * len(groups), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for panel, group in zip(panels, groups, strict=True):
        members = [line for line in lines if (line.loss, line.head) == group]
        for line in sorted(members, key=lambda line: -line.values[-1] / line.sizes[-1]):
            _draw_line(panel, line, _growth(line, axis, memory=memory))
        sizes = sorted({size for line in members for size in line.sizes})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=10)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, place: f"{value:,.10g}")
        panel.minorticks_off()
        panel.tick_params(axis="y", labelsize=10)
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("tokens, N" if axis == "tokens" else "vocabulary, V", fontsize=11, color=INK)
        panel.set_ylabel("memory beyond gradients, MiB" if memory else "time, ms", fontsize=11, color=INK)
        panel.set_title(f"{group[0]}, {group[1]} head, {_fixed(rows, axis)}", fontsize=11, color=INK, loc="left")
        panel.legend(fontsize=10, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), labelspacing=0.9)
    return figure


def _growth(line: Line, axis: str, *, memory: bool) -> str:
    """Return how a line grows, for the legend."""
    if len(line.sizes) < 2:
        return ""
    if not memory:
        return f"\nslope {log_slope(line):.2f}"
    unit = "1,000 tokens" if axis == "tokens" else "1,000 entries"
    return f"\n{1000 * upper_slope(line):,.0f} MiB per {unit}"


def _draw_line(panel: Any, line: Line, growth: str) -> None:
    floor, ours = line.peer == "floor", line.peer == "ours"
    panel.plot(
        line.sizes,
        line.values,
        marker="" if floor else "o",
        markersize=5,
        linestyle="--" if floor else "-",
        linewidth=2.6 if ours else 1.7,
        color=COLORS.get(line.peer, INK),
        label=name_of(line.peer) + growth,
        zorder=3 if ours else 2,
    )


def _fixed(rows: Rows, axis: str) -> str:
    """Return the sizes that a sweep does not change."""
    shape = rows[0]["shape"]
    other = f"V {shape['vocab']:,}" if axis == "tokens" else f"N {shape['n']:,}"
    return f"{other}, H {shape['student_width']:,}, {rows[0]['dtype']}"


def bar_figure(rows: Rows, *, memory: bool) -> Any:
    """Draw a bar for each peer: MiB beyond the gradients, or the time over that of the bare products, with its range."""
    groups = list(dict.fromkeys(_group(row) for row in rows))
    taken = [(row, groups.index(_group(row))) for row in rows if memory or "floor" in row["ratios"] or row["peer"] == "floor"]
    shown = [(row, group) for row, group in taken if memory or row["peer"] != "floor"]
    figure = new_figure(7.0, 1.1 + 0.24 * len(shown) + 0.4 * len(groups), layout="constrained")
    panel = figure.subplots()
    places, labels, height = [], [], 0.0
    for place, group in enumerate(groups):
        start = height
        for row in (row for row, number in shown if number == place):
            _draw_bar(panel, row, height, memory=memory)
            places.append(height)
            labels.append(name_of(row["peer"]))
            height += 1.0
        panel.text(0.0, start - 0.75, group, fontsize=10, color=INK, weight="bold", va="center")
        height += 1.6
    panel.set_yticks(places, labels, fontsize=9.5)
    panel.set_ylim(height - 1.6, -1.6)
    panel.margins(x=0.14)
    panel.set_xlim(left=0)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    if not memory:
        panel.axvline(1.0, color=FAINT, linewidth=1.2, linestyle="--")
    words = "peak memory beyond the gradients, MiB" if memory else "time over that of the bare matrix products (dashed), and ms"
    panel.set_xlabel(words, fontsize=10.5, color=INK)
    return figure


def _draw_bar(panel: Any, row: Mapping[str, Any], height: float, *, memory: bool) -> None:
    value = value_of(row)
    assert value is not None
    length, text, reach = value, f"{value:,.0f}", value
    if not memory:
        ratio = row["ratios"]["floor"]
        length, reach = ratio["median"], ratio["high"]
        panel.hlines(height, ratio["low"], ratio["high"], color=INK, linewidth=1.2, zorder=3)
        text = f"{length:.2f}   {value:,.0f} ms" if value >= 100 else f"{length:.2f}   {value:.3g} ms"
    panel.barh(height, length, height=0.8, color=COLORS.get(row["peer"], INK), zorder=2)
    panel.annotate(text, (reach, height), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9.5, color=INK)


def _group(row: Mapping[str, Any]) -> str:
    shape = row["shape"]
    malloc = f", malloc {row['malloc']}" if row.get("malloc", "default") != "default" else ""
    sizes = f"N {shape['n']:,}, V {shape['vocab']:,}, H {shape['student_width']:,}"
    return f"{row['loss']}, {row['head']} head{malloc}: {sizes}"
