"""Answers drawn by our loop are the model's, models come back from the disk, and operations are those that torch counts."""

import pytest
import torch

pytest.importorskip("transformers")

from torch.utils.flop_counter import FlopCounterMode

from quality.compute import Cost
from quality.generation import answer, rollouts
from quality.models import Schooling, Size, new_model, schooled
from quality.tasks import TASKS
from quality.tasks.task import END, PAD

TASK = TASKS["sorting"]
SIZE = Size(2, 16, 24)


@pytest.fixture
def model():
    return new_model(TASK, SIZE, seed=1)


@pytest.fixture
def prompts():
    return TASK.problems(7, torch.Generator().manual_seed(0), held_out=False)


def test_greedy_answers_are_those_of_generate(model, prompts):
    answers = answer(model, prompts, 12, None)
    whole = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=False)
    assert torch.equal(whole[:, prompts.shape[1] :], answers[:, : whole.shape[1] - prompts.shape[1]])


def test_draws_follow_the_model_and_the_generator(model, prompts):
    many = prompts[:1].expand(20_000, -1)
    first = answer(model, many, 1, torch.Generator().manual_seed(4))[:, 0]
    with torch.no_grad():
        expected = model(prompts[:1]).logits[0, -1].softmax(-1) * len(many)
    counts = first.bincount(minlength=TASK.vocabulary)
    assert float(((counts - expected).square() / expected).sum()) < 80  # chi-square, 41 degrees of freedom: 3e-4
    draws = [answer(model, prompts, 9, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_what_follows_the_end_is_padding_and_no_response():
    prompts = torch.tensor([[2, 5], [2, 6]])
    batch = rollouts(prompts, torch.tensor([[7, END, PAD], [PAD, 8, 9]]))
    assert batch["attention_mask"].tolist() == [[True, True, True, True, False], [True] * 5]
    assert batch["response_mask"].tolist() == [[False, False, True, True, False], [False, False, True, True, True]]


def test_a_model_comes_back_from_the_disk_and_other_schooling_is_another_model(tmp_path):
    said = []
    schooling = Schooling(SIZE, speaker_seed=1, decay=0.45, seed=3, steps=2, batch=4)
    first, again = (schooled(TASK, schooling, tmp_path, said.append) for _ in range(2))
    assert len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    schooled(TASK, Schooling(SIZE, speaker_seed=2, decay=0.45, seed=3, steps=2, batch=4), tmp_path, said.append)
    assert len(said) == 2


def test_operations_are_those_that_torch_counts(model, prompts):
    model.set_attn_implementation("eager")  # torch counts no other attention of the CPU
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(prompts, use_cache=False)
    tokens = prompts.numel()
    assert counter.get_total_flops() == Cost.of(model).forward(tokens, prompts.shape[1])
