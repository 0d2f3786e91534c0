"""The report of a method whose teacher reads another prompt: report.html, which needs nothing but itself, and its curves."""

import html
from pathlib import Path

from topd import files
from topd_demo import figures
from topd_demo.figures import NAMES, standard_error
from topd_demo.page import built, inline, plain_text, sample, save_png, table
from topd_demo.paired import PairedEvaluation, Row
from topd_demo.paired_words import WORDS, Words
from topd_demo.settings import Settings
from topd_demo.summary import Table, stages
from topd_demo.tokens import coloured, legend
from topd_demo.training import Run
from topd_demo.wording import collapse, held, warning

SAMPLES = 6


def write(folder: Path, run: Run, settings: Settings, description: str) -> Path:
    """Write everything that there is so far; return the page's path."""
    save_png(figures.drawn(_panels(run)), folder / "curves.png")
    page = folder / "report.html"
    files.write_text(page, build(run, settings, description))
    return page


def build(run: Run, settings: Settings, description: str) -> str:
    """Return the page."""
    words, before, after = WORDS[run.method], run.before, run.after
    panels = [inline(figures.drawn([panel])) for panel in _panels(run)]
    places = shown(before, after)
    return built(
        f"topd: {words.heading.lower()}",
        "paired.html",
        settings,
        stages=stages([run]),
        done=run.done == settings.steps,
        heading=words.heading,
        description=html.escape(description),
        note=words.note,
        tiles=_tiles(run, words),
        curves="".join(f"<figure>{panel}</figure>" for panel in panels),
        outcome=table(outcome(run)),
        kind="warning" if _collapse(run) else "",
        collapsed=html.escape(collapsed(run)),
        verdicts=_verdicts(before, after, words),
        said=words.said,
        samples="".join(_sample(before.rows[i], after.rows[i], run) for i in places),
        reads=_reads(after.rows[places[0]]),
        tokens_are=words.tokens_are,
        legend=legend(),
        tokens="".join(_tokens(before.rows[i], after.rows[i]) for i in places[:2]),
    )


def _panels(run: Run) -> list[figures.Panel]:
    """Return the panels of the curves."""
    words = WORDS[run.method]
    return figures.paired_panels(run, words.right_answers, words.teacher)


def shown(before: PairedEvaluation, after: PairedEvaluation) -> list[int]:
    """Return which held-out questions are shown: at first one that the student has wrong and the teacher right, before and
    after if there is one; then one of each kind of change, then the first."""
    rows = list(zip(before.rows, after.rows, strict=True))
    kinds = [(old.student_right, new.student_right, new.teacher_right) for old, new in rows]
    order = [(False, True, True), (False, False, True), (True, False, True), (True, True, True), (False, False, False)]
    firsts = [kinds.index(kind) for kind in order if kind in kinds]
    return list(dict.fromkeys([*firsts, *range(len(rows))]))[:SAMPLES]


def outcome(run: Run) -> Table:
    """Return the shares of right answers and the forward KL, before and after."""
    before, after, words = run.before, run.after, WORDS[run.method]
    count = len(before.rows)
    rows: list[tuple[str, ...]] = [
        (f"student: {words.right}", _share(before.right, count), _share(after.right, count)),
        (f"{words.teacher}: {words.right}", _share(before.teacher_right, count), _share(after.teacher_right, count)),
        ("forward KL, nats per token", f"{before.forward_kl:.2f}", f"{after.forward_kl:.2f}"),
    ]
    if before.control is not None:
        rows.insert(1, ("control: untrained, another draw", _share(before.control, count), ""))
    student, teacher = (before.student_wording, after.student_wording), (before.teacher_wording, after.teacher_wording)
    rows += [
        ("student: answers that end by themselves", *(f"{each.ended:.0%}" for each in student)),
        ("student: repeated 3-grams", *(f"{each.repeated:.0%}" for each in student)),
        (f"{words.teacher}: repeated 3-grams", *(f"{each.repeated:.0%}" for each in teacher)),
    ]
    return (f"{count} held-out questions", "before", f"after {run.done} steps"), rows


def collapsed(run: Run) -> str:
    """Return a sentence that says whether the student's answers are collapsed now, beside what the teacher said at first."""
    name, reason = NAMES[run.method], _collapse(run)
    return warning(name, reason, "forward KL") if reason else held([name])


def _collapse(run: Run) -> str:
    return collapse(run.after.student_wording, run.before.teacher_wording)


def _share(share: float, count: int) -> str:
    """Return a share of so many questions with its standard error."""
    return f"{share:.0%} ± {100 * standard_error(share, count):.0f}"


def _tiles(run: Run, words: Words) -> str:
    """Return the numbers at the top."""
    before, after, count = run.before, run.after, len(run.before.rows)
    control = "" if before.control is None else f", control {before.control:.0%}"
    tiles = [
        (
            f"student: {words.right}",
            f"{before.right:.0%} → {after.right:.0%}",
            f"of {count} held-out questions, ± {100 * standard_error(after.right, count):.0f}{control}",
            "opd",
        ),
        (
            f"{words.teacher}: {words.right}",
            f"{after.teacher_right:.0%}"
            if before.teacher_right == after.teacher_right
            else f"{before.teacher_right:.0%} → {after.teacher_right:.0%}",
            "which read more than the student",
            "topd",
        ),
        (
            "forward KL",
            f"{before.forward_kl:.2f} → {after.forward_kl:.2f}",
            f"nats per token, {after.forward_kl / before.forward_kl - 1:+.0%} in {run.done} steps",
            "opd",
        ),
    ]
    return "".join(
        f'<div class="tile {kind}"><span class="name">{name}</span><span class="value">{value}</span>'
        f'<span class="change">{change}</span></div>'
        for name, value, change, kind in tiles
    )


def _verdicts(before: PairedEvaluation, after: PairedEvaluation, words: Words) -> str:
    """Return the tables of verdicts: the student's answer by what the teacher says."""
    tables = []
    for title, evaluation in (("before", before), ("after", after)):
        right, wrong = evaluation.table()
        rows = [(f"student {words.right}", *map(str, right)), ("student not", *map(str, wrong))]
        tables.append(table(((title, f"{words.teacher} {words.right}", f"{words.teacher} not"), rows)))
    return f'<div class="pairs">{"".join(tables)}</div>'


def _sample(old: Row, new: Row, run: Run) -> str:
    """Return a question with what both sides say."""
    marks = {True: "✓ ", False: "✗ "}
    words = WORDS[run.method]
    answers = [("reference", new.reference)] if new.reference else []
    answers += [("before", marks[old.student_right] + old.student)]
    if old.teacher != new.teacher:
        answers += [(words.teacher, marks[old.teacher_right] + old.teacher)]
    answers += [("after", marks[new.student_right] + new.student), (words.teacher, marks[new.teacher_right] + new.teacher)]
    return sample(new.question, answers)


def _reads(row: Row) -> str:
    """Return both prompts."""
    prompts = (("student", row.student_reads), ("teacher", row.teacher_reads))
    lines = "".join(f'<dt>{name}</dt><dd class="reads">{html.escape(text.strip())}</dd>' for name, text in prompts)
    return f'<div class="sample"><dl>{lines}</dl></div>'


def _tokens(old: Row, new: Row) -> str:
    """Return a question's response before and after, token by token."""
    lines = "".join(
        f'<dt>{name}</dt><dd class="tokens">{coloured(row.tokens, row.nats)}</dd>'
        for name, row in (("before", old), ("after", new))
    )
    return f'<div class="sample"><p class="prompt">{plain_text(new.question)}</p><dl>{lines}</dl></div>'
