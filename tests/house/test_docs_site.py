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


@pytest.fixture
def rows() -> dict[str, Any]:
    """Return hidden states and heads of two small models, and labels of which three do not count."""
    generator = torch.Generator().manual_seed(0)
    student_hidden, teacher_hidden, student_weight, teacher_weight = (
        torch.randn(shape, generator=generator) for shape in ((12, 8), (12, 6), (40, 8), (40, 6))
    )
    labels = torch.randint(40, (12,), generator=generator).index_fill(0, torch.arange(3), -100)
    names = {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden, "true_labels": labels}
    return names | {"student": topd.Head(student_weight), "teacher": topd.Head(teacher_weight)}


def liger(rows: dict[str, Any], **options: Any) -> torch.Tensor:
    """Return Liger's loss of the same rows."""
    module = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    weights = rows["student"].weight, rows["teacher"].weight
    tensors = rows["student_hidden"], weights[0], rows["teacher_hidden"], weights[1], rows["true_labels"]
    return module.LigerFusedLinearJSDLoss(compiled=False, **options)(*tensors)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_questions_snippet_is_ligers_loss(rows, temperature):
    (snippet,) = re.findall(r"```python\n(.*?)```", pages()["faq"], re.DOTALL)
    names = {"topd": topd, "temperature": temperature, **rows}
    exec(compile(snippet, "faq.md", "exec"), names)
    torch.testing.assert_close(names["loss"], liger(rows, temperature=temperature))


@pytest.mark.filterwarnings("ignore")  # TRL says that its experimental module may change
@pytest.mark.parametrize(("beta", "divergence"), [(0.0, "forward_kl"), (0.3, topd.JSD(0.3)), (0.5, "jsd"), (1.0, "reverse_kl")])
def test_beta_means_what_the_questions_say(rows, beta, divergence):
    gkd = pytest.importorskip("trl.experimental.gkd")
    hidden, labels = (rows["student_hidden"], rows["teacher_hidden"]), rows["true_labels"]
    student, teacher, mask = rows["student"], rows["teacher"], labels != -100
    options = {"divergence": divergence, "temperature": 2.0, "mask": mask}
    ours = topd.linear_divergence(hidden[0], student, hidden[1], teacher, **options).sum() / mask.sum()
    logits = [(states @ head.weight.T)[None] for states, head in zip(hidden, (student, teacher), strict=True)]
    theirs = gkd.GKDTrainer.generalized_jsd_loss(*logits, labels[None], beta=beta, temperature=2.0)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours, liger(rows, beta=beta, temperature=2.0, weight_hard_loss=0.0, weight_soft_loss=1.0))
