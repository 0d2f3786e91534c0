"""The tasks: right answers are right by a second way, wrong ones are not, and the oracle calls wording alone surface."""

import pytest
import torch

from quality.tasks import TASKS
from quality.tasks.task import END, PAD, SYNONYMS, Speaker


@pytest.fixture(params=list(TASKS))
def task(request):
    return TASKS[request.param]


def worked(task, count=64, *, held_out=False):
    generator = torch.Generator().manual_seed(3)
    prompts = task.problems(count, generator, held_out=held_out)
    return prompts, task.answers(prompts, Speaker.of(task, 1, 0.45), generator)


def ids(task, text):
    return torch.tensor([[task.symbols.index(word) for word in text.split()]])


def test_an_addition_by_hand():
    task = TASKS["addition"]
    prompt = ids(task, "<start> 4 7 1 9 + 8 5 6 3 =")
    answer = ids(task, "so 9 3 makes 2 1 then 1 6 is 8 0 now 7 5 gives 2 1 thus 4 8 equals 3 1 sum 1 3 2 8 2 <end>")
    assert (task.prompt_length, task.answer_length) == (prompt.shape[1], answer.shape[1])
    assert torch.equal(task.contents(prompt)[:, task.layout < 0], answer[:, task.layout < 0])
    assert task.correct(prompt, answer).tolist() == [True]
    answer[0, 26] += 1
    assert task.correct(prompt, answer).tolist() == [False]


def test_a_sorting_by_hand():
    task = TASKS["sorting"]
    prompt = ids(task, "<start> q c k a m :")
    answer = ids(
        task,
        "take a leaving q c k m pick c left q k m draw k rest q m pull m still q grab q sorted a c k m q <end>",
    )
    assert torch.equal(task.contents(prompt)[:, task.layout < 0], answer[:, task.layout < 0])
    assert task.correct(prompt, answer).tolist() == [True]
    answer[0, 1] += 1  # a wrong step, a right conclusion
    assert task.correct(prompt, answer).tolist() == [True]
    answer[0, -2] += 1
    assert task.correct(prompt, answer).tolist() == [False]


def test_answers_are_right_by_plain_python(task):
    prompts, answers = worked(task)
    assert task.correct(prompts, answers).all()
    for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
        words, said = [task.symbols[token] for token in prompt], [task.symbols[token] for token in answer]
        if task.name == "addition":
            left, right = "".join(words[1:5]), "".join(words[6:10])
            assert int("".join(said[-6:-1])) == int(left) + int(right)
        else:
            assert said[-6:-1] == sorted(words[1:6])
        assert answer[-1] == END


def test_the_oracle_calls_every_synonym_in_its_slot_surface_and_nothing_else(task):
    _, answers = worked(task)
    assert torch.equal(task.surface(answers), (task.layout >= 0).expand_as(answers))
    shifted = answers.roll(1, dims=1)  # no token stands where it belongs, but a synonym beside one of its own slot
    assert not (task.surface(shifted) & (task.layout < 0)).any()
    content = answers.clone()
    content[:, task.layout >= 0] = task.first_content
    assert not task.surface(content).any()
    assert not task.surface(torch.full_like(answers, PAD)).any()


def test_any_wording_of_a_right_answer_is_right(task):
    prompts, answers = worked(task)
    for turn in range(1, SYNONYMS):
        other = answers.clone()
        first = task.first_synonym[task.layout.clamp_min(0)]
        slots = task.layout >= 0
        other[:, slots] = ((answers - first + turn) % SYNONYMS + first)[:, slots]
        assert task.correct(prompts, other).all()
        assert task.surface(other)[:, slots].all()


def test_held_out_problems_are_never_trained_on(task):
    train, held_out = (worked(task, 500, held_out=flag)[0] for flag in (False, True))
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in held_out.tolist()}


def test_a_speakers_habits_are_distributions_that_depend_on_the_token_before(task):
    habits = Speaker.of(task, 1, 0.45).habits
    torch.testing.assert_close(habits.sum(-1), torch.ones(habits.shape[:2]))
    assert (habits.max(-1).values > 0.5).all()
    favourite = habits.argmax(-1)
    assert len(favourite.unique()) == SYNONYMS
    others = torch.stack([Speaker.of(task, seed, 0.45).habits.argmax(-1) for seed in range(2, 42)])
    assert (favourite == others).float().mean().item() == pytest.approx(1 / 6, abs=0.03)  # by chance
