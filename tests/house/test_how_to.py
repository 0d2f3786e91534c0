"""The how-to pages run as they are printed, top to bottom, and what they show is what comes."""

import pytest
import torch
from pages import DOCS, run_page
from two_ranks import start

SEVERAL = "several-processes"  # runs in two processes
NEEDS = {
    "lora": ("peft",),
    "migrate-from-liger": ("liger_kernel",),
    "migrate-from-trl": ("trl",),
    SEVERAL: ("accelerate",),
}
PAGES = sorted(path.stem for path in (DOCS / "how-to").glob("*.md") if path.stem not in ("index", SEVERAL))


@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs_as_printed(page, tmp_path, monkeypatch):
    for module in ("transformers", *NEEDS.get(page, ())):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "how-to" / f"{page}.md")


def test_the_page_of_several_processes_runs_in_two(tmp_path):
    for module in ("transformers", *NEEDS[SEVERAL]):
        pytest.importorskip(module)
    first, second = start("house/two_page_ranks.py", tmp_path, timeout=300)
    assert first["gradient"].abs().max() > 0
    assert torch.equal(first["gradient"], second["gradient"])
