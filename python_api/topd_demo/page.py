"""The pieces of a report's page, which needs nothing but itself: its frame, tables, pictures."""

import html
import io
import re
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from topd import files
from topd.plots import FAINT, INK
from topd_demo import figures
from topd_demo.settings import Settings
from topd_demo.summary import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
# Colours of the pictures, and the page's names for them, which differ by day and by night.
THEME = {
    "#ffffff": "none",
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    figures.RULE: "var(--rule)",
    figures.COLORS["opd"]: "var(--blue)",
    figures.COLORS["topd"]: "var(--orange)",
}


def built(title: str, body: str, settings: Settings, *, stages: Table, done: bool, **fields: str) -> str:
    """Return a page.

    Args:
        title: its title, HTML.
        body: the file of its body.
        stages: what a step spends its time on.
        done: whether the run came to its end.
        fields: HTML for the body's fields.
    """
    of_plain_methods = ("horizon", "left_out") if settings.paired else ()
    options = [(name, _shown(value)) for name, value in settings.to_json().items() if name not in of_plain_methods]
    state = "" if done else '<p class="note">The run was stopped before its end; this is what there was.</p>'
    text = Template(_read(body)).substitute(fields, state=state)
    tables = {"stages": table(stages), "settings": table((("option", "value"), list(options)))}
    return Template(_read("page.html")).substitute(tables, title=title, body=text)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure as a picture."""
    with files.whole(path) as unfinished:
        figure.savefig(unfinished, format="png", bbox_inches="tight")


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


def table(numbers: Table) -> str:
    """Return a table."""
    header, rows = numbers
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shown(value: object) -> str:
    """Return an option's value as the page shows it."""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else "-" if value is None else str(value)


def plain_text(text: str) -> str:
    """Return a text in one line, escaped."""
    return html.escape(" ".join(text.split()))


def sample(question: str, answers: list[tuple[str, str]]) -> str:
    """Return a question with what was said to it, each under a name."""
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{plain_text(text)}</dd>" for name, text in answers)
    return f'<div class="sample"><p class="prompt">{plain_text(question)}</p><dl>{lines}</dl></div>'


def beside(question: str, answers: dict[str, str]) -> str:
    """Return a question with the answers to it, by name, side by side where there is room."""
    columns = "".join(
        f'<div class="{name.lower()}"><dt>{html.escape(name)}</dt><dd>{plain_text(text) or "(nothing)"}</dd></div>'
        for name, text in answers.items()
    )
    return f'<div class="sample"><p class="prompt">{plain_text(question)}</p><dl class="beside">{columns}</dl></div>'
