"""The tutorials run as they are printed, top to bottom, and what they show is what comes."""

import pytest
from pages import DOCS, run_page

# What each page needs beside transformers.
NEEDS: dict[str, tuple[str, ...]] = {
    "a-first-loss": (),
    "profile-before-you-train": (),
    "your-own-rollouts": (),
}


@pytest.mark.parametrize("page", NEEDS)
def test_the_page_runs_as_printed(page, tmp_path, monkeypatch):
    for module in ("transformers", *NEEDS[page]):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "tutorials" / f"{page}.md")
