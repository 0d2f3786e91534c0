"""The documentation's site: no public name and no page is missing, and snippets run. No sphinx is needed."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import topd
import topd.trd

DOCS = Path(__file__).parents[2] / "docs"
DIRECTIVE = re.compile(r"^\.\. auto\w+:: (\S+)", re.MULTILINE)
TOCTREE = re.compile(r"```{toctree}\n(.*?)```", re.DOTALL)


def pages() -> dict[str, str]:
    """Return the text of each page by its name under docs/, without the suffix."""
    return {path.relative_to(DOCS).with_suffix("").as_posix(): path.read_text() for path in DOCS.rglob("*.md")}


def test_each_public_name_stands_in_the_reference_once():
    names = Counter(name for page, text in pages().items() if page.startswith("reference/") for name in DIRECTIVE.findall(text))
    assert {name: count for name, count in names.items() if count > 1} == {}
    public = {f"topd.{name}" for name in topd.__all__} | {f"topd.trd.{name}" for name in topd.trd.__all__}
    adapters = {name for name in names if name.startswith(("topd.integrations.", "topd.plots."))}
    assert set(names) - adapters == public


def test_each_adapter_that_an_example_imports_stands_in_the_reference():
    text = "\n".join(path.read_text() for path in (DOCS.parent / "examples").glob("*.py"))
    imports = re.findall(r"^from (topd\.(?:integrations\.\w+|plots)) import (.+)$", text, re.MULTILINE)
    used = {f"{module}.{name.strip()}" for module, names in imports for name in names.split(",")}
    assert len(used) >= 5
    assert used <= set(DIRECTIVE.findall(pages()["reference/integrations"]))


def test_each_page_stands_in_one_toctree():
    entries: Counter[str] = Counter()
    for page, text in pages().items():
        folder = Path(page).parent
        for block in TOCTREE.findall(text):
            lines = (line.strip() for line in block.splitlines())
            entries.update((folder / line).as_posix() for line in lines if line and not line.startswith(":"))
    assert entries == Counter(set(pages()) - {"index"})


def test_the_landing_pages_snippets_run_and_agree():
    pytest.importorskip("transformers")
    from tiny_models import tiny

    eager, ours = re.findall(r"```python\n(.*?)```", pages()["index"], re.DOTALL)
    eager = eager.replace(".float()", ".double()")  # in float32 the models' own rounding hides what the losses differ in
    student, teacher = tiny("llama").double(), tiny("qwen3", seed=3).double()
    input_ids = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs["response_mask"] = torch.arange(12).expand(2, 12) >= 4
    losses, grads = [], []
    for snippet in (eager, ours):
        student.zero_grad()
        names: dict[str, Any] = {"student_model": student, "teacher_model": teacher, **inputs}
        exec(compile(snippet, "index.md", "exec"), names)
        losses.append(names["loss"].detach())
        grads.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]))
    assert losses[0] > 0
    torch.testing.assert_close(losses[1], losses[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-12, rtol=1e-10)
