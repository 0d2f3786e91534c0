"""The how-to pages run as they are printed, top to bottom, and what they show is what comes."""

import pytest
import torch
from pages import DOCS, run_page
from two_ranks import start

import topd

SEVERAL = "several-processes"  # runs in two processes
NEEDS = {
    "choose-divergence-and-temperature": ("matplotlib",),
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


def test_the_page_of_a_teacher_elsewhere_runs_as_printed():
    pytest.importorskip("transformers")
    names = run_page(DOCS / "teacher-elsewhere.md")
    assert abs(names["right"] - names["true"]) < 1e-5 * names["true"]
    assert abs(names["wrong"] - names["true"]) > 0.05 * names["true"]


@pytest.mark.filterwarnings("ignore")  # TRL says that its experimental module may change
@pytest.mark.parametrize(("beta", "divergence"), [(0.0, "forward_kl"), (0.3, topd.JSD(0.3)), (0.5, "jsd"), (1.0, "reverse_kl")])
def test_beta_means_the_same_in_trl_liger_and_topd(beta, divergence):
    """To the digits that float32 has; the pages show four."""
    gkd, jsd_loss = pytest.importorskip("trl.experimental.gkd"), pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 8), (40, 8), (12, 6), (40, 6))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    labels = torch.randint(40, (12,), generator=generator).index_fill(0, torch.arange(3), -100)
    states, weights, mask = tensors[::2], tensors[1::2], labels != -100
    student, teacher = map(topd.Head, weights)
    options = {"divergence": divergence, "temperature": 2.0, "mask": mask}
    ours = topd.linear_divergence(states[0], student, states[1], teacher, **options).sum() / mask.sum()
    logits = [(hidden @ weight.T)[None] for hidden, weight in zip(states, weights, strict=True)]
    trl = gkd.GKDTrainer.generalized_jsd_loss(*logits, labels[None], beta=beta, temperature=2.0)
    options = {"temperature": 2.0, "weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": False}
    liger = jsd_loss.LigerFusedLinearJSDLoss(beta=beta, **options)(*tensors, labels)
    torch.testing.assert_close(ours, trl, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours, liger, atol=1e-6, rtol=1e-5)
