"""The tutorials run as they are printed, top to bottom, and what they show is what comes."""

import pytest
from pages import DOCS, run_page

# A tutorial, and the packages that it needs.
PAGES = {
    "opd-with-trl": ("trl", "datasets", "peft"),
    "teacher-behind-a-server": ("transformers",),
}


def test_every_tutorial_is_run():
    assert set(PAGES) == {path.stem for path in (DOCS / "tutorials").glob("*.md")} - {"index"}


@pytest.mark.parametrize("page", PAGES)
def test_the_tutorial_runs_as_printed(page, tmp_path, monkeypatch):
    for module in PAGES[page]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "tutorials" / f"{page}.md")
