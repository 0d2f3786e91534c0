"""tools/demo_step.py: the table of a step by stage, by hand; the warm-up round does not count."""

import pytest
import torch

from tools.demo_step import mebibytes, multiplying, reading, table
from topd_bench.step import Step, with_rollouts
from topd_bench.timing import Sample


def timed(*milliseconds):
    return [Sample(each) for each in milliseconds]


def taken(*stages):
    step = Step.__new__(Step)
    step.stages = list(stages)
    return step


def test_a_step_is_counted_with_the_rollouts_of_its_round():
    assert [each.time_ms for each in with_rollouts(timed(1, 2), timed(10, 30))] == [11, 32]


def test_medians_of_the_timed_rounds_and_the_ratio_round_by_round():
    steps = {
        "OPD": taken({"backward": 9.0}, {"backward": 1.0}, {"backward": 3.0}),
        "TOPD": taken({"backward": 9.0, "guidance": 9.0}, *[{"backward": 4.0, "guidance": 0.5}] * 2),
    }
    samples = {"rollouts": timed(1000, 2000), "OPD": timed(1000, 2000), "TOPD": timed(3000, 4000)}
    rows = {row[0]: row[1:] for row in table(steps, samples)}
    assert rows["backward"] == ["2.00", "4.00"]
    assert rows["guidance"] == ["-", "0.50"]
    assert rows["step"] == ["1.50", "3.50"]
    assert rows["/ OPD, rollouts counted"] == ["1", "1.75 (1.50-2.00)"]  # 4 / 2 and 6 / 4


def test_reading_a_model_takes_each_weight_once():
    model = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    assert reading(model)() == 6
    assert mebibytes(model) * 2**20 == pytest.approx(8 * 4)


def test_every_matrix_is_multiplied_once_with_so_many_rows(monkeypatch):
    shapes = []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda rows, weight: shapes.append((*rows.shape, *weight.shape)))
    multiplying(torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(4, 6)]), 5)()
    assert shapes == [(5, 3, 2, 3), (5, 4, 6, 4)]
