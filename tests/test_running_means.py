"""The trainer's means between two lines of a log."""

import math

import torch

from topd.integrations.running_means import RunningMeans

NAN = math.nan


def metrics(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_means_and_shares():
    """Shares of a step's loss add up over its parts, others are averaged; `loss` is the trainer's."""
    means = RunningMeans()
    means.add(metrics(loss=9.0, opd_loss=1.0, tokens=3.0), 2)
    means.add(metrics(loss=9.0, opd_loss=2.0, tokens=5.0), 2)
    assert means.take() == {"opd_loss": 3.0, "tokens": 4.0}
    assert means.take() == {}


def test_what_was_not_measured_is_no_part_of_a_mean():
    means = RunningMeans()
    for distance in (NAN, 0.25, NAN, 0.75):
        means.add(metrics(distance_false_alarm=distance, distance_divergent=NAN, tokens=2.0))
    assert means.take() == {"distance_false_alarm": 0.5, "tokens": 2.0}


def test_an_infinite_loss_is_still_seen():
    means = RunningMeans()
    means.add(metrics(opd_loss=math.inf, tokens=2.0))
    means.add(metrics(opd_loss=1.0, tokens=4.0))
    assert means.take() == {"opd_loss": math.inf, "tokens": 3.0}


def test_processes_that_measured_nothing_do_not_count():
    """Three processes: sums and counts are averaged, then divided."""
    processes = []
    for distances in ([1.0, 2.0], [NAN, NAN], [NAN, 6.0]):
        means = RunningMeans()
        for distance in distances:
            means.add(metrics(distance_false_alarm=distance))
        means.take(lambda values: processes.append(values) or values)
    mean = torch.stack(processes).mean(0)
    means.add(metrics(distance_false_alarm=1.0))
    assert means.take(lambda _: mean) == {"distance_false_alarm": 3.0}
