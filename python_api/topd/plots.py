"""Pictures of the near future: how far windows diverge, and which teacher tokens a student's window is matched with.

matplotlib is imported when a figure is drawn, pyplot never: no display is needed, no global state changes. Text is shown as it
is: a "$" in a token starts no formula.
"""

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_tensor, positive_int
from topd.near_future.transport import Transport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette, which people with any colour vision tell apart.
PALETTE = ("#D55E00", "#009E73", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9")
SAME, OTHER, INK, FAINT = "#0072B2", "#D55E00", "#222222", "#767676"
LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False, "color": INK}
FEWEST, MOST_SINGLE, MOST_BINS = 20, 300, 80  # values for a histogram; values drawn one by one; bins
LEAST_SHARE = 0.05  # of the largest mass: a link below it is left out
MAX_LABEL, COLUMN = 14, 0.0753  # columns; inches, the width of a 9 pt monospaced character
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}


def new_figure(width: float, height: float, **options: Any) -> "Figure":
    """Return an empty figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('topd.plots needs matplotlib, which is not installed: pip install "topd[plots]"') from error
    return Figure(figsize=(width, height), dpi=150, facecolor="white", **options)


def plot_distance_distribution(groups: Mapping[str, Tensor], *, title: str | None = None) -> "Figure":
    """Draw the distribution of the near-future distance in each group of tokens, with its median.

    A histogram a group, scaled to its own peak; up to 300 values are also drawn one by one, fewer than 20 without a histogram.

    Args:
        groups: the name of each group, say "high loss", "random" and "low loss", with its distances [m] floating, m >= 1 and
            finite, as in `Transport.distance`, in the unit of the cost; in this order from top to bottom.
        title: above the figure.

    Returns:
        matplotlib.figure.Figure, 7 inches wide.

    Raises:
        TypeError, ValueError: no group, an empty one, a distance that is not finite, a wrong type, dtype or shape.
        ImportError: matplotlib is not installed.

    Source: arXiv 2606.00305, whose medians are 0.566 at high-loss tokens, 0.361 at random and 0.315 at low-loss ones.
    """
    values = _check_groups(groups)
    heading = "" if title is None else textwrap.fill(_string("title", title), 68)
    low, high = (end.item() for end in torch.cat(list(values.values())).aminmax())
    margin = 0.03 * (high - low) or 0.1 * abs(high) or 0.5
    limits = {"xlim": (low - margin, high + margin)}
    figure = new_figure(7.0, 0.7 + 0.95 * len(values) + 0.25 * len(heading.splitlines()), layout="constrained")
    panels = figure.subplots(len(values), 1, sharex=True, squeeze=False, subplot_kw=limits)[:, 0]
    for place, (panel, (name, value)) in enumerate(zip(panels, values.items(), strict=True)):
        _draw_group(panel, value, high - low or margin, PALETTE[place % len(PALETTE)])
        label = f"{textwrap.fill(name, 18, max_lines=3, placeholder='…')}\nn = {value.numel():,}"
        panel.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, **LITERAL)
        panel.tick_params(axis="x", length=0, labelbottom=place == len(values) - 1, labelcolor=INK)
    panels[-1].set_xlabel("near-future distance $D_{\\mathrm{OT}}$", color=INK)
    figure.suptitle(heading, fontsize=12, **LITERAL)
    return figure


def _string(name: str, value: object) -> str:
    """Check for a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    return value


def _check_groups(groups: object) -> dict[str, Tensor]:
    """Check the groups' distances, and return them as float64 on the CPU."""
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"groups must be a mapping from one name or more to distances, got {groups!r:.60}")
    checked = {}
    for key, distances in groups.items():
        name = f"groups[{_string('each name in groups', key)!r}]"
        value = check_tensor(name, distances, dtype=FLOATING).detach().double().cpu()
        if value.dim() != 1 or not value.numel():
            raise ValueError(f"{name} must be [m], m >= 1, got {list(value.shape)}; flatten it, and leave empty groups out")
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got {value[~value.isfinite()][0].item()}; leave such distances out")
        checked[key] = value
    return checked


def _draw_group(panel: Any, value: Tensor, span: float, color: str) -> None:
    """Draw a histogram up to height 1, its bins after Freedman and Diaconis; single values below, the median's figure above."""
    low, lower, median, upper, high = value.quantile(torch.linspace(0, 1, 5, dtype=value.dtype)).tolist()
    single, few = value.numel() <= MOST_SINGLE, value.numel() < FEWEST
    if few:
        panel.plot(value.numpy(), [0.4] * value.numel(), "o", color=color, markersize=7, markeredgewidth=0, alpha=0.55)
    else:
        if high - low < 1e-6 * span:
            low, high = low - span / 100, high + span / 100
        width = 2 * (upper - lower) / value.numel() ** (1 / 3) or span / 40
        bins = 1 + int(min(MOST_BINS - 1, (high - low) / width))
        counts, edges = torch.histc(value, bins, low, high), torch.linspace(low, high, bins + 1)
        panel.stairs((counts / counts.max()).numpy(), edges.numpy(), fill=True, color=color, alpha=0.45, linewidth=0)
        if single:
            panel.vlines(value.numpy(), -0.28, -0.08, color=color, linewidth=0.8, alpha=0.7)
    panel.vlines(median, 0, 1.4, color=color, linewidth=2)
    offset, side = (5, "left") if 2 * median <= sum(panel.get_xlim()) else (-5, "right")
    place = {"xytext": (offset, 0), "textcoords": "offset points", "ha": side, "va": "center"}
    panel.annotate(f"median {_three_figures(median)}", (median, 1.24), **place, **LITERAL)
    panel.set(ylim=(-0.34 if single and not few else -0.02, 1.45), yticks=[], axisbelow=True)
    panel.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    panel.spines[:].set_visible(False)
    panel.axhline(0, color=FAINT, linewidth=0.8)


def _three_figures(value: float) -> str:
    """Return a number in three significant figures."""
    return f"{value:#.3g}".rstrip(".")


def plot_window_pair(
    transport: Transport,
    index: int,
    student_tokens: Sequence[str],
    teacher_tokens: Sequence[str],
    *,
    student_length: int | None = None,
    teacher_length: int | None = None,
    title: str | None = None,
) -> "Figure":
    """Draw one window pair: the student's tokens above, the teacher's below, and a link wherever the plan moves mass.

    A link's width and opacity follow its mass, its colour says whether the texts are equal. Links under 5 % of the heaviest are
    left out, which the figure says. Spaces, newlines and tabs are made visible, texts over 14 columns shortened.

    Args:
        transport: of `near_future_divergence`: a plan [m, K_s, K_t], rows student positions, columns teacher positions.
        index: 0 <= index < m, the pair.
        student_tokens, teacher_tokens: the decoded text of each token, as many as the window is long, or K_s and K_t. For a
            script that matplotlib's own font lacks set matplotlib.rcParams["font.monospace"].
        student_length, teacher_length: tokens, 1 <= length <= K, no mass past them; None: up to the last token with mass.
        title: before the distance, which is always written, in the unit of the cost; None: "window pair <index>".

    Returns:
        matplotlib.figure.Figure, 6 to 13 inches wide for up to 50 tokens.

    Raises:
        TypeError, ValueError: a wrong type, index, length or number of tokens; a plan that is negative, not finite or 0.
        ImportError: matplotlib is not installed.

    Source: the plan of arXiv 2606.00305; the picture is our choice.
    """
    plan = _check_plan(transport, index)
    students = _check_texts("student", student_tokens, student_length, plan.sum(1))
    teachers = _check_texts("teacher", teacher_tokens, teacher_length, plan.sum(0))
    heading = f"window pair {index}" if title is None else _string("title", title)
    return _draw_pair(plan, students, teachers, f"{heading}: distance {_three_figures(transport.distance[index].item())}")


def _check_plan(transport: object, index: object) -> Tensor:
    """Check a pair's plan, and return it as float64 [K_s, K_t] on the CPU."""
    if not isinstance(transport, Transport):
        raise TypeError(f"transport must be a topd.Transport, got {type(transport).__name__}; call near_future_divergence")
    if type(index) is not int or not 0 <= index < len(transport.plan):
        raise ValueError(f"index must be an int in [0, {len(transport.plan)}), the pairs of transport, got {index!r}")
    plan = transport.plan[index].detach().double().cpu()
    if not (plan.isfinite().all() and (plan >= 0).all() and plan.any()):
        raise ValueError(f"transport.plan must be finite, >= 0 and not all 0, at index {index} it is not; look at its windows")
    return plan


def _check_texts(side: str, tokens: object, length: int | None, mass: Tensor) -> list[str]:
    """Check the texts of a side, and return those within the window's length."""
    name, width, last = f"{side}_tokens", mass.numel(), int(mass.nonzero()[-1]) + 1
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not all(isinstance(text, str) for text in tokens):
        raise TypeError(f"{name} must be a list of strings, one for each token; decode the tokens one by one")
    if length is not None and not last <= positive_int(f"{side}_length", length) <= width:
        raise ValueError(f"{side}_length must lie in [{last}, {width}], from the plan's last mass to its width, got {length}")
    wanted = last if length is None else length
    if len(tokens) not in (wanted, width):
        raise ValueError(f"{name} must hold {wanted} texts, the window's length, or {width}, its width, got {len(tokens)}")
    return list(tokens[:wanted])


def _columns(text: str) -> int:
    """Return how many columns of a monospaced font a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _label(text: str) -> str:
    """Return the text with every character visible, in MAX_LABEL columns."""
    shown = "".join(VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text) or "∅"
    if _columns(shown) <= MAX_LABEL:
        return shown
    return next(shown[:end] for end in range(MAX_LABEL, -1, -1) if _columns(shown[:end]) < MAX_LABEL) + "…"


def _draw_pair(plan: Tensor, students: list[str], teachers: list[str], heading: str) -> "Figure":
    """Draw a pair, placed in inches; labels stand upright where they would not fit side by side."""
    labels = [[_label(text) for text in side] for side in (students, teachers)]
    tall = [COLUMN * max(map(_columns, side)) for side in labels]
    count, left = max(map(len, labels)), 0.95
    upright = count * (max(tall) + 0.16) > 11
    pitch = max(0.22 if upright else max(tall) + 0.16, 4.9 / count)
    width = left + count * pitch + 0.15
    above, below = tall if upright else (0.18, 0.18)
    lower = 0.72 + below
    upper = lower + min(2.6, max(1.3, 0.2 * width))
    heading = textwrap.fill(heading, int((width - 0.4) / 0.095))
    figure = new_figure(width, height := upper + above + 0.4 + 0.22 * len(heading.splitlines()))
    axes: Any = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    axes.text(0.15, height - 0.12, heading, va="top", fontsize=12, **LITERAL)
    for name, side, y, step in (("student", labels[0], upper, 0.09), ("teacher", labels[1], lower, -0.09)):
        axes.text(0.15, y, name, va="center", fontsize=10, weight="bold", **LITERAL)
        style = {"rotation": 90 if upright else 0, "ha": "center", "va": "bottom" if step > 0 else "top", "fontsize": 9}
        for place, label in enumerate(side):
            x = left + (place + 0.5) * pitch
            axes.plot(x, y, "o", color=INK, markersize=3.5)
            axes.text(x, y + step, label, family="monospace", **style, **LITERAL)
    same = torch.tensor([[a == b for b in teachers] for a in students])
    _draw_links(axes, plan[: len(students), : len(teachers)] / plan.max(), same, left + 0.5 * pitch, pitch, upper, lower)
    return figure


def _draw_links(axes: Any, share: Tensor, same: Tensor, start: float, pitch: float, upper: float, lower: float) -> None:
    """Draw curves from the student's row to the teacher's, the heaviest on top, and the key below the rows."""
    from matplotlib import collections, lines, path

    drawn = (share >= LEAST_SHARE).nonzero()
    drawn = drawn[share[tuple(drawn.T)].argsort(stable=True)]
    mass = share[tuple(drawn.T)].numpy()
    colors = [SAME if equal else OTHER for equal in same[tuple(drawn.T)].tolist()]
    curve = [path.Path.MOVETO] + [path.Path.CURVE4] * 3
    heights = (upper - 0.05, (upper + lower) / 2, (upper + lower) / 2, lower + 0.05)
    paths = [path.Path(list(zip((a, a, b, b), heights, strict=True)), curve) for a, b in (start + pitch * drawn).tolist()]
    style: dict[str, Any] = {"facecolors": "none", "edgecolors": colors, "linewidths": 0.4 + 2.2 * mass}
    axes.add_collection(collections.PathCollection(paths, alpha=0.1 + 0.8 * mass, capstyle="round", **style), autolim=False)
    kinds = ((SAME, "same text"), (OTHER, "different text"))
    handles = [lines.Line2D([], [], color=color, linewidth=2.2, label=label) for color, label in kinds if color in colors]
    place = {"loc": "lower left", "bbox_to_anchor": (0.15, 0.26), "bbox_transform": axes.transData, "ncols": 2}
    axes.legend(handles=handles, frameon=False, borderpad=0, borderaxespad=0, fontsize=9, labelcolor=INK, **place)
    if percent := 100 * (share[share < LEAST_SHARE].sum() / share.sum()).item():
        note = f"links under {100 * LEAST_SHARE:.0f} % of the heaviest are left out: {percent:.2g} % of the mass"
        axes.text(0.15, 0.08, note, va="bottom", fontsize=8, **LITERAL | {"color": FAINT})
