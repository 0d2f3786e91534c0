"""The how-to pages run as they are printed, top to bottom, and what they show is what comes."""

import pytest
from pages import DOCS, run_page

PAGES = sorted(path for path in (DOCS / "how-to").glob("*.md") if path.name != "index.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_page_runs_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)
