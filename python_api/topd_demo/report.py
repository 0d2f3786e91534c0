"""The report of OPD and TOPD: report.html, which needs nothing but itself, and its pictures as files."""

import html
from pathlib import Path

from topd import files
from topd_demo import figures
from topd_demo.loss_cost import LossCost
from topd_demo.page import beside, built, inline, plain_text, save_png, table
from topd_demo.settings import Settings
from topd_demo.summary import summarise
from topd_demo.training import Run

SAMPLES = 6  # prompts whose answers are on show at once


def write(folder: Path, runs: list[Run], cost: LossCost | None, settings: Settings, description: str) -> Path:
    """Write everything that there is so far; return the page's path."""
    save_png(figures.curves(runs), folder / "curves.png")
    pairs = [figure for run in runs if (figure := figures.windows(run)) is not None]
    if pairs:
        save_png(pairs[-1], folder / "windows.png")
    page = folder / "report.html"
    files.write_text(page, build(runs, cost, settings, description))
    return page


def build(runs: list[Run], cost: LossCost | None, settings: Settings, description: str) -> str:
    """Return the page."""
    summary = summarise(runs, cost)
    pair = next((run for run in reversed(runs) if run.pair is not None), None)
    panels = [inline(figures.drawn([figures.panel(name, runs)])) for name in figures.PANELS]
    done = all(run.done == settings.steps for run in runs)
    return built(
        "topd: an on-policy distillation",
        "plain.html",
        settings,
        stages=summary.stages,
        done=done,
        description=html.escape(description),
        tiles="".join(_tile(run) for run in runs if run.before is not None),
        warnings="".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in summary.warnings),
        tokens=str(settings.held_out_tokens),
        samples=_samples(summary.samples),
        wordings=table(summary.wordings) + (f"<p>{html.escape(summary.held)}</p>" if summary.held else ""),
        curves="".join(f"<figure>{panel}</figure>" for panel in panels),
        outcome=table(summary.outcome),
        loss=table(summary.loss) if summary.loss else "<p class='note'>Not measured: the run did not get there.</p>",
        agreement=f"The two values differ by {cost.difference:.0e} of their size." if cost else "",
        windows=_windows(pair),
    )


def _tile(run: Run) -> str:
    """Return a method's reverse KL before and after."""
    change = run.after.reverse_kl / run.before.reverse_kl - 1
    return (
        f'<div class="tile {run.method}"><span class="name">{figures.NAMES[run.method]}</span>'
        f'<span class="value">{run.before.reverse_kl:.2f} → {run.after.reverse_kl:.2f}</span>'
        f'<span class="change">{change:+.0%} in {run.done} steps</span></div>'
    )


def _windows(run: Run | None) -> str:
    """Return TOPD's pair of windows."""
    if run is None or run.pair is None:
        return "<p class='note'>TOPD did not run.</p>"
    drawn = figures.windows(run)
    assert drawn is not None
    return f'<p class="note">… {plain_text(run.pair.prefix)} …</p><div class="wide">{inline(drawn)}</div>'


def _samples(samples: list[tuple[str, dict[str, str]]]) -> str:
    """Return the answers beside each other, the first few at once."""
    blocks = [beside(prompt, answers) for prompt, answers in samples]
    rest = "".join(blocks[SAMPLES:])
    more = f"<details><summary>The other {len(blocks) - SAMPLES} held-out prompts</summary>{rest}</details>" if rest else ""
    return "".join(blocks[:SAMPLES]) + more
