"""What the README and the examples print is what runs."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


README = (ROOT / "README.md").read_text()
FIGURE = json.loads((ROOT / "docs" / "figures" / "loss.json").read_text())["cases"]  # the H200's comes last


@pytest.fixture
def double() -> Iterator[None]:
    """Make new models float64: in float32 their own rounding hides what the losses differ in."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def steps(double) -> list[dict[str, Any]]:
    """Run the snippets in their order, as one program; return the names that stand after each of them."""
    pytest.importorskip("transformers")
    names: dict[str, Any] = {}
    states = []
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(snippet, "README.md", "exec"), names)
        states.append(dict(names))
    return states


def test_before_and_after_are_the_same_loss(steps):
    """Also token by token, and the mean over the response tokens of the models' own distributions."""
    models, before, after = steps
    assert models["response_mask"].sum() == after["mask"].sum() == 2 * 48
    torch.testing.assert_close(after["loss"], before["loss"], atol=1e-12, rtol=1e-10)
    counted = before["reverse_kl"].where(before["mask"], 0.0)
    torch.testing.assert_close(after["reverse_kl"][:, :-1], counted, atol=1e-12, rtol=1e-10)
    with torch.no_grad():
        both = [models[f"{side}_model"](models["input_ids"]).logits.log_softmax(-1) for side in ("student", "teacher")]
    student, teacher = (logprobs[:, 15:-1] for logprobs in both)
    expected = (student.exp() * (student - teacher)).sum(-1).mean()
    torch.testing.assert_close(after["loss"].detach(), expected, atol=1e-12, rtol=1e-10)


def test_the_student_alone_gets_gradients_and_they_are_those_of_before(steps):
    models, before, _ = steps
    parameters = list(models["student_model"].parameters())
    assert all(parameter.grad is not None and parameter.grad.ne(0).any() for parameter in parameters)
    assert all(parameter.grad is None for parameter in models["teacher_model"].parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(before["loss"], parameters), strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-12, rtol=1e-8)


def test_both_versions_divide_safely_where_no_token_counts():
    pytest.importorskip("transformers")
    source = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)).replace(">= 16", ">= 64")
    names: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["mask"].sum() == 0
    assert names["loss"] == 0
    assert not any(parameter.grad.any() for parameter in names["student_model"].parameters())


def test_it_is_short():
    assert len(README.splitlines()) <= 110


def test_it_names_the_two_commands_and_what_stands_before_the_note_on_the_name():
    assert all(command in README for command in ("`make test`", "`make demo`"))
    assert README.index("## Install") < README.index("```python") < README.index("2607.04751")


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    assert targets
    for target in (target for target in targets if not target.startswith("https://")):
        name, _, anchor = target.partition("#")
        path = ROOT / (name or page)
        assert path.exists(), f"{page} links to {name}"
        assert not anchor or anchor in headings(path), f"{page} links to {target}"


def cells(page: str) -> set[str]:
    """Return every word of a page's tables, without the commas of thousands."""
    lines = (line for line in (ROOT / page).read_text().splitlines() if line.startswith("|"))
    return {word for line in lines for word in re.sub(r"(\d),(\d{3})", r"\1\2", line).split()}


def test_the_figures_numbers_stand_in_the_tables_that_it_names():
    """The times of each case in one row beside their commit; that of the H200's floor is in the page's text."""
    assert len(FIGURE) == 3
    for case in FIGURE:
        time, memory = case["time"], case["memory"]
        page = (ROOT / time["page"]).read_text()
        ratios = {f"{ratio:.2f}" for ratio in time["ratios"].values()}
        rows = [set(line.split()) for line in page.splitlines() if line.startswith("|") and time["commit"] in line]
        in_text = time["page"] == "docs/gpu-h200.md" and "at 95e3f0e: reverse KL 1.18," in page
        assert any(ratios <= row for row in rows) or (in_text and ratios - {"1.18"} <= cells(time["page"]))
        assert time["commit"] in page
        assert memory["commit"] in (ROOT / memory["page"]).read_text()
        assert {str(mib) for mib in memory["peak_mib"].values()} <= cells(memory["page"])


def test_readmes_row_is_the_figures_last_case():
    """Its times are those of the H200's table, its peaks the figure's."""
    row = next(line for line in README.splitlines() if line.startswith("| time; peak memory"))
    memory = FIGURE[-1]["memory"]
    gib = [f"{(mib + memory['gradients_to_add_mib']) / 1024:.1f} GiB" for mib in memory["peak_mib"].values()]
    assert re.findall(r"[\d.]+ GiB", row) == gib
    assert set(re.findall(r"([\d.]+) ms", row)) <= cells(memory["page"])


def test_the_figure_is_drawn_from_its_file(tmp_path):
    pytest.importorskip("matplotlib")
    from tools import readme_figure

    assert readme_figure.main(["--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(readme_figure.THEMES)
    assert all((ROOT / "docs" / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in readme_figure.THEMES)
    case = FIGURE[-1]
    assert readme_figure.times(case)["floor"] == (pytest.approx(1 / 1.18), "0.85")
    assert readme_figure.peaks(case)["liger"] == (pytest.approx((1335 + 1251) / (8629 + 1251)), "2.5 GiB")


def test_the_first_example_distils(capsys):
    runpy.run_path(str(ROOT / "examples" / "first_loss.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"reverse KL +([\d.]+) nats", capsys.readouterr().out)]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]


def test_every_divergence_of_the_table_exists():
    import topd
    from topd.divergences import BY_NAME

    page = (ROOT / "docs" / "linear_divergence.md").read_text()
    rows = re.findall(r"^\| `\"(\w+)\"` \| `(\w+)\(", page, re.MULTILINE)
    assert {name for name, _ in rows} == set(BY_NAME)
    for name, made_by in rows:
        assert getattr(topd, made_by)().name == name
