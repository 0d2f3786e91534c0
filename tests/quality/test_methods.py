"""The rows: what they change of topd's objectives, by hand and beside topd's own."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import topd
from quality.generation import answer, rollouts
from quality.methods import ROWS, objective_of, weights_of
from quality.models import Size, new_model
from quality.tasks import TASKS
from quality.training import surface_of

TASK = TASKS["addition"]


@pytest.fixture(scope="module")
def setting():
    student, teacher = (new_model(TASK, Size(2, 16, 24), seed=seed) for seed in (1, 2))
    prompts = TASK.problems(4, torch.Generator().manual_seed(0), held_out=False)
    answers = answer(student, prompts, TASK.answer_length, torch.Generator().manual_seed(1))
    answers[:, 3] = TASK.first_synonym[1]  # random students hardly ever say a synonym where it belongs
    return student, teacher.requires_grad_(False), rollouts(prompts, answers), surface_of(TASK, prompts, answers)


def generator():
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize("name", list(ROWS))
def test_every_row_teaches_something_and_repeats(setting, name):
    student, teacher, batch, surface = setting
    step = objective_of(ROWS[name], student, teacher)
    losses = []
    for _ in range(2):
        student.zero_grad()
        objective = step(batch, surface, generator())
        objective.loss.backward()
        losses.append(objective.loss.item())
        assert sum(parameter.grad.abs().sum() for parameter in student.parameters()) > 0
    assert losses[0] == losses[1] > 0
    assert (objective.near_future is None) == (ROWS[name].near_future is None)


def test_the_oracle_decides_what_diverges(setting):
    student, teacher, batch, surface = setting
    everywhere = replace(ROWS["oracle"], config=replace(ROWS["oracle"].config, candidate_value=1.0))
    near = objective_of(everywhere, student, teacher)(batch, surface, generator()).near_future
    row, column = near.windows.positions.unbind(-1)
    assert torch.equal(near.divergent, ~surface[row, column])
    assert len(row) == batch["response_mask"].sum()
    assert 0 < int((surface & batch["response_mask"].bool()).sum()) == int((~near.divergent).sum()) < len(row)


def looked(loss, distance, divergent):
    positions = torch.tensor([[0, 1], [0, 2], [0, 4], [1, 3]])
    windows = topd.Windows(positions, *[torch.zeros(4, 1, dtype=torch.int64)] * 2, *[torch.ones(4, dtype=torch.int64)] * 2)
    transport = topd.Transport(torch.tensor(distance), torch.ones(4, 1, 1), torch.zeros(4))
    near = topd.NearFuture(windows, transport, torch.tensor(divergent), torch.tensor(loss))
    zeros = torch.zeros_like(near.score)
    scores = topd.TokenScores(zeros, near.score, zeros, zeros, zeros, zeros, zeros.bool(), zeros, zeros)
    return topd.Objective(torch.zeros(()), {}, scores, None, near)


def test_weights_of_the_capped_rows_by_hand():
    """The medians of the answers are 2 and 1: false alarms of loss 8 and 4 weigh a quarter each, one of loss 1 weighs 1."""
    loss = [[1.0, 8.0, 2.0, 1.0, 4.0], [1.0, 1.0, 0.5, 4.0, 3.0]]
    look = looked(loss, [0.1, 0.9, 0.5, 0.2], [False, True, True, False])
    response = torch.ones(2, 5, dtype=torch.bool)
    low, high = torch.ones(2, 5), torch.ones(2, 5)
    low[0, 1] = low[1, 3] = 0.25
    high[0, 2] = high[0, 4] = 0.25  # of the highest distance
    assert torch.equal(weights_of("low", look, response), low)
    assert torch.equal(weights_of("high", look, response), high)


def test_capped_rows_move_no_weight_between_tokens(setting):
    """Their loss is OPD's with those weights, divided by all response tokens."""
    student, teacher, batch, surface = setting
    objective = objective_of(ROWS["low_ot"], student, teacher)(batch, surface, generator())
    plain = topd.OPD(student, teacher)(batch)
    weights = weights_of("low", replace(plain, near_future=objective.near_future), batch["response_mask"])
    expected = (weights * plain.scores.reverse_kl).sum() / batch["response_mask"].sum()
    torch.testing.assert_close(objective.loss.detach(), expected)
    assert expected < plain.loss
