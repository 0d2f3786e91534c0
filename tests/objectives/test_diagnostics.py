"""Diagnostics of a step: by hand, and the same however the step is cut."""

import math

import pytest
import torch

from topd.objectives.diagnostics import DIAGNOSTICS, NEEDS, Measured, TeacherTop2, Totals, diagnostics_of, totals_of

INF = math.inf


def measured(divergence, **options):
    """Return a row of response tokens, each of probability 1/2 for the student and 1/4 for the teacher."""
    values = torch.tensor([divergence], dtype=torch.float64)
    ones = torch.ones_like(values)
    given = {"response": ones.bool(), "input_ids": ones.long(), "student_logprob": -math.log(2) * ones}
    return Measured(values, **{**given, "teacher_logprob": -math.log(4) * ones, **options})


def metrics_of(divergence, **options):
    return {name: value.item() for name, value in totals_of(measured(divergence, **options)).metrics().items()}


def test_means_shares_and_perplexities_by_hand():
    verdict = torch.tensor([[True, True, False, False]])
    metrics = metrics_of([0.1, 0.3, 0.5, 1.1], clip=0.4, verdict=verdict)
    expected = {
        "kl_mean": 0.5,
        "clip_share": 0.5,
        "kl_correct": 0.2,
        "kl_incorrect": 0.8,
        "tokens_correct": 2.0,
        "tokens_incorrect": 2.0,
        "kl_max": 1.1,
        "student_perplexity": 2.0,
        "teacher_perplexity": 4.0,
        "perplexity_gap": -2.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    mean = (2 * metrics["kl_correct"] + 2 * metrics["kl_incorrect"]) / 4
    assert mean == pytest.approx(metrics["kl_mean"], rel=1e-12)


def test_tokens_outside_the_response_are_not_read():
    response = torch.tensor([[False, True, True]])
    metrics = metrics_of([math.nan, 1.0, 3.0], response=response)
    assert (metrics["kl_mean"], metrics["kl_max"]) == (2.0, 3.0)


def test_percentiles_are_within_one_percent():
    values = torch.logspace(-7, 2, 1001, dtype=torch.float64)
    metrics = metrics_of(values.tolist())
    for name, share in {"kl_p50": 0.5, "kl_p95": 0.95, "kl_p99": 0.99}.items():
        true = torch.quantile(values, share, interpolation="higher").item()
        assert metrics[name] == pytest.approx(true, rel=0.0101)


@pytest.mark.parametrize("value", [4.797, 1.0, 1e-5, -0.31])
def test_no_percentile_exceeds_the_largest_divergence(value):
    """Its bin's middle may: a log that shows kl_p99 above kl_max is read as a mistake."""
    metrics = metrics_of([value] * 3)
    assert [metrics[name] <= metrics["kl_max"] == value for name in ("kl_p50", "kl_p95", "kl_p99")] == [True] * 3


def test_negative_tiny_and_infinite_divergences_have_a_percentile():
    assert metrics_of([-1.0, -0.5, 2.0])["kl_p50"] == pytest.approx(-0.5, rel=0.0101)
    assert metrics_of([0.0, 1e-12, 3.0])["kl_p50"] == 0.0
    metrics = metrics_of([1.0, INF, INF])
    assert (metrics["kl_p50"], metrics["kl_max"], metrics["kl_mean"]) == (INF, INF, INF)
    metrics = metrics_of([1.0, math.nan, math.nan])
    assert metrics["kl_p50"] == INF
    assert math.isnan(metrics["kl_max"])


def test_bimodal_and_fragmented_tokens_by_hand():
    """The teacher gives two tokens 0.4 each; wants 7 twice, which the response never says; then wants 9, which it says."""
    high, low = math.log(0.4), math.log(0.01)
    top2 = TeacherTop2(
        torch.tensor([[[high, high], [high, low], [high, low], [high, low]]], dtype=torch.float64),
        torch.tensor([[[1, 2], [7, 1], [7, 1], [9, 7]]]),
    )
    ids, teacher = torch.tensor([[1, 3, 4, 9]]), torch.tensor([[high, low, low, high]], dtype=torch.float64)
    metrics = metrics_of([1.0] * 4, input_ids=ids, teacher_logprob=teacher, top2=top2)
    assert (metrics["bimodal_share"], metrics["fragmented_share"]) == (0.25, 0.25)
    met = metrics_of([1.0] * 4, input_ids=torch.tensor([[1, 3, 7, 9]]), teacher_logprob=teacher, top2=top2)
    assert met["fragmented_share"] == 0.0


def test_what_was_not_measured_is_nan():
    metrics = metrics_of([1.0, 2.0])
    assert {name for name, value in metrics.items() if math.isnan(value)} == set(NEEDS)
    nothing = metrics_of([1.0], response=torch.tensor([[False]]))
    assert nothing.keys() == set(DIAGNOSTICS)
    assert all(math.isnan(value) for value in nothing.values())
    given = measured([1.0, 2.0], clip=0.5)
    assert diagnostics_of(given, totals_of(given)).keys() == set(DIAGNOSTICS) - set(NEEDS) | {"clip_share"}


def test_a_teacher_known_by_its_top_k_has_the_perplexity_of_the_tokens_that_it_knows():
    teacher = torch.tensor([[math.log(0.5), math.nan]], dtype=torch.float64)
    metrics = metrics_of([1.0, 1.0], teacher_logprob=teacher)
    assert (metrics["student_perplexity"], metrics["teacher_perplexity"]) == pytest.approx((2.0, 2.0))


def test_totals_add_over_parts_and_processes():
    """Eight tokens in one part, in four, and in two processes of unequal size: the same diagnostics."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 8, generator=generator, dtype=torch.float64).exp()
    student, teacher = -torch.rand(2, 1, 8, generator=generator, dtype=torch.float64)
    verdict = torch.tensor([[True, False, True, True, False, True, False, False]])

    def part(start, stop):
        columns = slice(start, stop)
        logprobs = {"student_logprob": student[:, columns], "teacher_logprob": teacher[:, columns]}
        return totals_of(measured(values[0, columns].tolist(), verdict=verdict[:, columns], clip=1.0, **logprobs))

    whole = part(0, 8).metrics()
    for parts in ([part(0, 1), part(1, 4), part(4, 6), part(6, 8)],):
        total = parts[0]
        for other in parts[1:]:
            total = total.plus(other)
        torch.testing.assert_close(total.metrics(), whole, rtol=1e-12, atol=0, equal_nan=True)
    processes = Totals.of_processes(torch.stack([part(0, 3).flat(), part(3, 8).flat()]))
    torch.testing.assert_close(processes.metrics(), whole, rtol=1e-12, atol=0, equal_nan=True)


def test_no_tokens_at_all():
    empty = Measured(
        *(torch.zeros(0, 0, dtype=kind) for kind in (torch.float64, torch.bool, torch.int64, *[torch.float64] * 2))
    )
    assert totals_of(empty).sums.sum() == 0


def test_no_value_is_read_on_the_host():
    """On the device meta there are no values: whatever makes the host wait for one raises."""
    meta = {"device": "meta"}
    number = torch.zeros(2, 5, **meta)
    yes, ids = torch.ones(2, 5, dtype=torch.bool, **meta), torch.ones(2, 5, dtype=torch.int64, **meta)
    top2 = TeacherTop2(torch.zeros(2, 5, 2, **meta), torch.zeros(2, 5, 2, dtype=torch.int64, **meta))
    given = Measured(number, yes, ids, number, number, 0.1, yes, number, top2)
    totals = totals_of(given)
    assert diagnostics_of(given, totals).keys() == set(DIAGNOSTICS)
    assert Totals.of_processes(totals.plus(totals).flat().expand(2, -1)).sums.shape == totals.sums.shape
