"""The tutorials run as they are printed, top to bottom, and what they show is what comes."""

import re

import pytest
import smollm2_cases
import torch
from pages import DOCS, assert_same_text, blocks_of, run_page

import topd
from topd.integrations.rollouts import sample_rollouts

# A tutorial, and the packages that it needs.
PAGES = {
    "a-first-loss": ("transformers",),
    "opd-with-trl": ("trl", "datasets", "peft"),
    "profile-before-you-train": ("transformers",),
    "teacher-behind-a-server": ("transformers",),
    "topd-step-by-step": ("gguf", "matplotlib"),
    "your-own-rollouts": ("transformers",),
}
QUESTIONS = (
    "Why is the sky blue?",
    "Explain what a prime number is.",
    "Name three colours and say what they remind you of.",
    "Write two sentences about the sea.",
)


def test_every_tutorial_is_run():
    assert set(PAGES) == {path.stem for path in (DOCS / "tutorials").glob("*.md")} - {"index"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[smollm2_cases.needs_model, pytest.mark.slow] if "gguf" in needed else [])
        for page, needed in PAGES.items()
    ],
)
def test_the_tutorial_runs_as_printed(page, tmp_path, monkeypatch):
    for module in PAGES[page]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "tutorials" / f"{page}.md")


@pytest.mark.slow
@smollm2_cases.needs_model
def test_what_the_topk_of_a_trained_teacher_costs(capsys):
    """The second table of the page, of SmolLM2 and a student without the layer that matters least."""
    from topd_demo.influence import least_influence, without_layers

    page = DOCS / "tutorials" / "teacher-behind-a-server.md"
    names = {"torch": torch, "topd": topd}
    exec(next(block.code for block in blocks_of(page) if "def cost_of_k" in block.code), names)
    teacher, tokenizer = smollm2_cases.model(), smollm2_cases.tokenizer()
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(chats, **options)
    attended = prompts["input_ids"], prompts["attention_mask"]
    student = without_layers(teacher, least_influence(teacher, *attended)[:1]).requires_grad_(False)
    student.model.layers[-1].requires_grad_(True)
    torch.manual_seed(0)
    batch = sample_rollouts(student, *attended, max_new_tokens=32)
    names["cost_of_k"](student, teacher, batch)
    table = re.search(r"SmolLM2.*?```text\n(.*?)```", page.read_text(), re.DOTALL)
    assert table is not None
    assert_same_text(capsys.readouterr().out, table[1], page.name)
