"""RunningMeans and RunningTotals: between two lines of a log, without what measured nothing, over processes too."""

import math

import torch

from topd.integrations.running_means import RunningMeans, RunningTotals
from topd.objectives.diagnostics import Measured, totals_of

NAN = math.nan


def means_of(*steps, parts=1, across=None):
    means = RunningMeans()
    for step in steps:
        means.add({name: torch.tensor(value) for name, value in step.items()}, parts)
    return means.take(across)


def test_a_mean_by_hand_without_the_loss():
    assert means_of({"tokens": 2.0, "loss": 5.0}, {"tokens": 4.0, "loss": 5.0}) == {"tokens": 3.0}


def test_shares_of_a_step_are_summed_over_its_parts():
    assert means_of({"opd_loss": 0.25}, {"opd_loss": 0.5}, parts=2) == {"opd_loss": 0.75}


def test_what_measured_nothing_is_no_part_of_the_mean():
    means = means_of({"distance": NAN, "tokens": 1.0}, {"distance": 3.0, "tokens": 2.0}, {"distance": 5.0, "tokens": 3.0})
    assert means == {"distance": 4.0, "tokens": 2.0}


def test_a_metric_that_came_in_some_steps_is_the_mean_of_those():
    assert means_of({"tokens": 1.0}, {"tokens": 3.0, "window_length": 7.0}) == {"tokens": 2.0, "window_length": 7.0}


def test_what_never_measured_anything_is_left_out():
    assert means_of({"distance": NAN, "tokens": 1.0}, {"distance": NAN, "tokens": 2.0}) == {"tokens": 1.5}


def test_infinity_is_a_measurement():
    assert means_of({"entropy": 1.0}, {"entropy": math.inf}) == {"entropy": math.inf}


def test_a_loss_that_is_nan_shows():
    means = means_of({"opd_loss": NAN, "guidance_loss": 1.0}, {"opd_loss": 1.0, "guidance_loss": 1.0})
    assert math.isnan(means["opd_loss"])
    assert means["guidance_loss"] == 1.0


def test_over_processes_each_measurement_counts_once():
    """This process measured 3 once and nothing once, the other 5 and 7: their mean is 5. Both hand over one shape."""
    shapes = []

    def with_the_other(values):
        shapes.append(list(values.shape))
        sums, counts = torch.tensor([12.0, 4.0]), torch.tensor([2.0, 2.0])
        return (values + torch.cat([sums, counts])) / 2

    means = means_of({"distance": 3.0, "tokens": 1.0}, {"distance": NAN, "tokens": 3.0}, across=with_the_other)
    assert means == {"distance": 5.0, "tokens": 2.0}
    means = means_of({"distance": NAN, "tokens": 1.0}, {"distance": NAN, "tokens": 3.0}, across=with_the_other)
    assert means == {"distance": 6.0, "tokens": 2.0}
    assert shapes == [[4], [4]]


def test_taking_them_starts_anew():
    means = RunningMeans()
    means.add({"tokens": torch.tensor(2.0)})
    assert means.take() == {"tokens": 2.0}
    assert means.take() == {}


def totals(*divergences, **options):
    """Return the totals of tokens that student and teacher both give 1/2."""
    values = torch.tensor(divergences, dtype=torch.float64)
    half = torch.full_like(values, 0.5).log()
    response = torch.ones_like(values, dtype=torch.bool)
    return totals_of(Measured(values, response, response.long(), half, half, **options))


def test_diagnostics_are_of_all_tokens_not_of_micro_batches():
    """Tokens of 1, 1, 1 nats and one of 5: their mean is 2, a mean of means would be 3. What no part measured is left out."""
    means, running = RunningMeans(), RunningTotals()
    for part in (totals(1.0, 1.0, 1.0), totals(5.0), totals()):
        means.add({"kl_mean": torch.tensor(7.0), "tokens": torch.tensor(1.0)})
        running.add(part)
    assert means.take() == {"tokens": 1.0}
    values = running.take()
    assert (values["kl_mean"], values["kl_max"], values["student_perplexity"]) == (2.0, 5.0, 2.0)
    assert "kl_correct" not in values
    assert "clip_share" not in values
    assert running.take() == {}


def test_diagnostics_of_processes_are_gathered_as_one_tensor():
    running = RunningTotals()
    running.add(totals(1.0, clip=0.5))
    values = running.take(lambda flat: torch.cat([flat, totals(3.0, 0.1, 0.1, clip=0.5).flat().unsqueeze(0)]))
    assert (values["kl_mean"], values["clip_share"], values["kl_max"]) == (1.05, 0.5, 3.0)
