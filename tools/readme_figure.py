"""Draw README's figure from docs/figures/loss.json: time and peak memory of the reverse KL beside other programs.

    python -m tools.readme_figure

It writes docs/figures/loss.png, for light pages, and loss-dark.png, for dark ones. The file has nothing but numbers that a
table of the documentation prints, with that page and its commit; tests/house/test_readme.py compares them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from topd import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
NAMES = {"floor": "matrix products alone", "topd": "topd", "eager": "plain torch", "trl": "TRL 1.16", "liger": "Liger 0.8.5"}
# Of Okabe and Ito's palette, which people with any colour vision tell apart.
COLOURS = {"floor": "#999999", "topd": "#0072B2", "eager": "#E69F00", "trl": "#D55E00", "liger": "#CC79A7"}
BAR, GAP = 0.8, 1.9  # of a row: the height of a bar, the rows between two cases with the case's title


class Theme(NamedTuple):
    """Colours of text, lines and page; a page of None is transparent."""

    ink: str
    faint: str
    page: str | None


THEMES = {"loss.png": Theme("#222222", "#767676", "white"), "loss-dark.png": Theme("#e6e6e6", "#a0a0a0", None)}


def times(case: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return each program's time as a multiple of topd's, and what its bar says."""
    ratios = case["time"]["ratios"]
    multiples = {"floor": 1 / ratios["topd/floor"], "topd": 1.0}
    multiples |= {name: ratios[f"{name}/topd"] for name in NAMES if f"{name}/topd" in ratios}
    return {name: (value, f"{value:.2f}") for name, value in multiples.items()}


def peaks(case: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return each program's peak as a multiple of topd's, and what its bar says: GiB, the returned gradients included."""
    memory = case["memory"]
    whole = {name: mib + memory["gradients_to_add_mib"] for name, mib in memory["peak_mib"].items()}
    return {name: (mib / whole["topd"], f"{mib / 1024:.1f} GiB") for name, mib in whole.items()}


def draw_panel(axes: "Axes", cases: list[dict[str, Any]], measure: Any, title: str, theme: Theme) -> None:
    """Draw one bar a program, from top to bottom, with the case's title above its bars."""
    row, longest = 0.0, 0.0
    for case in cases:
        axes.text(0, row, case["title"], color=theme.ink, fontsize=9.5, weight="bold", va="center")
        axes.text(0, row + 0.85, case["shape"], color=theme.faint, fontsize=8, va="center")
        row += 1.9
        values = measure(case)
        for name in (name for name in NAMES if name in values):
            multiple, label = values[name]
            axes.barh(row, multiple, BAR, color=COLOURS[name])
            words: dict[str, Any] = {"color": theme.ink, "weight": "bold" if name == "topd" else "normal"}
            axes.text(multiple + 0.03, row, f"{NAMES[name]}  {label}", fontsize=8.5, va="center", **words)
            row, longest = row + 1, max(longest, multiple)
        row += GAP - 1
    axes.set_xlim(0, 1.55 * longest)
    axes.set_ylim(row - GAP + 0.6, -0.9)
    axes.set_title(title, color=theme.ink, fontsize=10.5, loc="left", pad=8)
    axes.set_yticks([])
    axes.tick_params(colors=theme.faint, labelsize=8)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)


def draw(cases: list[dict[str, Any]], theme: Theme) -> "Figure":
    """Return the figure: times on the left, peak memory on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 5.6), dpi=200, facecolor=theme.page or "none", layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_panel(left, cases, times, "Time, as a multiple of topd's", theme)
    draw_panel(right, cases, peaks, "Peak memory, as a multiple of topd's", theme)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=FOLDER / "loss.json", help="the numbers (default docs/figures/loss.json)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="a folder for the two pictures (default docs/figures)")
    arguments = parser.parse_args(argv)
    cases = json.loads(arguments.json.read_text(encoding="utf-8"))["cases"]
    for name, theme in THEMES.items():
        figure = draw(cases, theme)
        with files.whole(arguments.out / name) as path:
            figure.savefig(path, format="png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
