"""The report folder: report.html, which needs nothing but itself, and the same pictures and numbers as files."""

import html
import io
import re
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from topd import files
from topd.plots import FAINT, INK
from topd_demo import figures
from topd_demo.loss_cost import LossCost
from topd_demo.settings import Settings
from topd_demo.summary import Table, summarise
from topd_demo.training import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Path(__file__).with_name("page.html")
# Colours of the pictures, and the page's names for them, which differ by day and by night.
THEME = {
    "#ffffff": "none",
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    figures.RULE: "var(--rule)",
    figures.COLORS["opd"]: "var(--blue)",
    figures.COLORS["topd"]: "var(--orange)",
}


def write(folder: Path, runs: list[Run], cost: LossCost | None, settings: Settings, description: str) -> Path:
    """Write everything that there is so far; return the page's path."""
    _save_png(figures.curves(runs), folder / "curves.png")
    pairs = [figure for run in runs if (figure := figures.windows(run)) is not None]
    if pairs:
        _save_png(pairs[-1], folder / "windows.png")
    page = folder / "report.html"
    files.write_text(page, build(runs, cost, settings, description))
    return page


def _save_png(figure: "Figure", path: Path) -> None:
    """Write a figure as a picture."""
    with files.whole(path) as unfinished:
        figure.savefig(unfinished, format="png", bbox_inches="tight")


def build(runs: list[Run], cost: LossCost | None, settings: Settings, description: str) -> str:
    """Return the page."""
    summary = summarise(runs, cost)
    pair = next((run for run in reversed(runs) if run.pair is not None), None)
    panels = [inline(figures.panel(name, runs)) for name in figures.PANELS]
    done = all(run.done == settings.steps for run in runs)
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        description=html.escape(description),
        state="" if done else '<p class="note">The run was stopped before its end; this is what there was.</p>',
        tiles="".join(_tile(run) for run in runs if run.before is not None),
        curves="".join(f"<figure>{panel}</figure>" for panel in panels),
        outcome=_table(summary.outcome),
        loss=_table(summary.loss) if summary.loss else "<p class='note'>Not measured: the run did not get there.</p>",
        agreement=f"The two values differ by {cost.difference:.0e} of their size." if cost else "",
        stages=_table(summary.stages),
        samples=_samples(runs),
        windows=_windows(pair),
        settings=_table((("option", "value"), [(name, _shown(value)) for name, value in settings.to_json().items()])),
    )


def inline(figure: "Figure") -> str:
    """Return a figure as SVG whose colours are the page's."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "topd"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    for color, name in THEME.items():
        drawing = re.sub(re.escape(color), name, drawing, flags=re.IGNORECASE)
    return drawing


def _tile(run: Run) -> str:
    """Return a method's reverse KL before and after."""
    assert run.before is not None
    assert run.after is not None
    change = run.after.reverse_kl / run.before.reverse_kl - 1
    return (
        f'<div class="tile {run.method}"><span class="name">{figures.NAMES[run.method]}</span>'
        f'<span class="value">{run.before.reverse_kl:.2f} → {run.after.reverse_kl:.2f}</span>'
        f'<span class="change">{change:+.0%} in {run.done} steps</span></div>'
    )


def _table(numbers: Table) -> str:
    """Return a table."""
    header, rows = numbers
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shown(value: object) -> str:
    """Return an option's value as the page shows it."""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else "-" if value is None else str(value)


def _windows(run: Run | None) -> str:
    """Return TOPD's pair of windows."""
    if run is None or run.pair is None:
        return "<p class='note'>TOPD did not run.</p>"
    drawn = figures.windows(run)
    assert drawn is not None
    prefix = html.escape(" ".join(run.pair.prefix.split()))
    return f'<p class="note">… {prefix} …</p><div class="wide">{inline(drawn)}</div>'


def _samples(runs: list[Run]) -> str:
    """Return the student's answers before and after."""
    shown = [run for run in runs if run.before is not None and run.after is not None]
    if not shown:
        return ""
    blocks = []
    assert shown[0].before is not None
    for place, (prompt, before) in enumerate(shown[0].before.samples):
        answers = [("before", before)]
        answers += [(figures.NAMES[run.method], run.after.samples[place][1]) for run in shown if run.after is not None]
        lines = "".join(f"<dt>{name}</dt><dd>{html.escape(' '.join(text.split()))}</dd>" for name, text in answers)
        blocks.append(
            f'<div class="sample"><p class="prompt">{html.escape(" ".join(prompt.split()))}</p><dl>{lines}</dl></div>'
        )
    return "".join(blocks)
