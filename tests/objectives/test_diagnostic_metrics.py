"""Diagnostics among an objective's metrics: equal to plain float64 on whole distributions, and the same in parts as whole."""

import math
from functools import reduce

import pytest
import torch
from diagnostics_cases import EPISTEMIC, assert_diagnostics, numbers, truth
from matrix_products import H, N, V, matrix_products
from objective_cases import batch_of as same_prompts
from pair_cases import LAYOUTS, batch_of, models, rows_of
from topk_teacher_cases import with_topk

import topd
from topd.objectives.batch import Padded
from topd.objectives.diagnostics import Totals
from topd.objectives.inputs import Inputs
from topd.objectives.metrics import diagnosed
from topd.objectives.token_losses import token_losses

ALL = {"epistemic_ids": EPISTEMIC, "teacher_top2": True, "position_clip": 0.5}
VERDICT = [True, False, False, True]
ALWAYS = {"kl_mean", "kl_p50", "kl_p95", "kl_p99", "kl_max", "student_perplexity", "teacher_perplexity", "perplexity_gap"}
WITH_VERDICT = {"kl_correct", "kl_incorrect", "tokens_correct", "tokens_incorrect"}


def distributions(student, teacher, batch, temperature):
    """Return of each row log p_S, log p_T, the response's tokens and their columns."""
    sides = []
    with torch.no_grad():
        for own, other in zip(rows_of(batch, ""), rows_of(batch, "teacher_"), strict=True):
            logprobs = [
                (model(tokens.unsqueeze(0)).logits[0] / temperature).log_softmax(-1)[places - 1]
                for model, (tokens, places) in ((student, own), (teacher, other))
            ]
            sides.append((*logprobs, own[0][own[1]], own[1]))
    return sides


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_diagnostics_of_whole_distributions(layout):
    """At a low temperature, at which the models are sure of some tokens."""
    student, teacher = models()
    config = topd.OPDConfig("forward_kl", temperature=0.1, **(ALL | {"position_clip": 6.5}))
    batch = batch_of(layout)
    expected = truth(distributions(student, teacher, batch, config.temperature), VERDICT, config)
    assert 0 < expected["clip_share"] < 1
    assert expected["fragmented_share"] > 0
    objective = topd.OPD(student, teacher, config)(batch | {"verdict": torch.tensor(VERDICT)})
    values = numbers(objective.totals.metrics())
    assert_diagnostics(values, expected, 1e-9)
    assert_diagnostics(numbers(objective.metrics), values, 1e-6)
    shares = [values[f"tokens_{kind}"] * values[f"kl_{kind}"] for kind in ("correct", "incorrect")]
    assert sum(shares) == pytest.approx(20 * values["kl_mean"], rel=1e-12)


@pytest.mark.parametrize(("divergence", "options"), [("reverse_kl", {"top_k": 5}), (topd.JSD(0.3), {}), ("reverse_kl", {})])
def test_random_distributions_over_vocabularies_that_differ(divergence, options):
    """Logits as states under identity heads: the student has 5 tokens, the teacher 6; both are taken on the first 5."""
    generator = torch.Generator().manual_seed(3)
    logits = [1.5 * torch.randn(8, 61, size, generator=generator, dtype=torch.float64) for size in (5, 6)]
    response = torch.rand(8, 61, generator=generator) < 0.8
    response[:, 0] = False
    ids = torch.randint(5, (8, 61), generator=generator)
    verdict = torch.arange(8) % 3 == 0
    config = topd.OPDConfig(divergence, temperature=0.8, **options, **(ALL | {"epistemic_ids": (1, 4)}))
    heads = [topd.Head(torch.eye(size, dtype=torch.float64)) for size in (5, 6)]
    inputs = Inputs(Padded(ids, torch.ones_like(response), response), verdict=verdict)
    losses = token_losses((logits[0], heads[0]), (logits[1], heads[1]), inputs, config)
    totals, _ = diagnosed(losses, inputs, config)
    sides = []
    for row in range(8):
        columns = response[row].nonzero()[:, 0]
        both = [(each[row, columns - 1, :5] / 0.8).log_softmax(-1) for each in logits]
        sides.append((*both, ids[row, columns], columns))
    expected = truth(sides, verdict.tolist(), config)
    assert all(expected[name] > 0.02 for name in ("bimodal_share", "fragmented_share", "epistemic_mass", "clip_share"))
    assert_diagnostics(numbers(totals.metrics()), expected, 1e-10)


def test_which_diagnostics_there_are_follows_from_configuration_and_batch():
    student, teacher = models()
    batch = batch_of()
    with_verdict = batch | {"verdict": torch.tensor(VERDICT)}
    assert numbers(topd.TRD(student, teacher)(batch).metrics).keys() == ALWAYS
    assert numbers(topd.OPSD(student)(with_verdict).metrics).keys() == ALWAYS | WITH_VERDICT
    shares = {"clip_share", "epistemic_mass", "bimodal_share", "fragmented_share"}
    assert numbers(topd.OPD(student, teacher, topd.OPDConfig(**ALL))(batch).metrics).keys() == ALWAYS | shares
    config = topd.TOPDConfig(horizon=3, **ALL)
    batch = {**same_prompts(), "verdict": torch.tensor(VERDICT[:3])}
    assert numbers(topd.TOPD(student, teacher, config)(batch).metrics).keys() == ALWAYS | shares | WITH_VERDICT


def test_what_has_no_token_is_nan():
    """No incorrect response: 0 would say that the models agree there. No response token at all: nothing was measured."""
    student, teacher = models()
    batch = batch_of() | {"verdict": torch.ones(4, dtype=torch.bool)}
    metrics = topd.TRD(student, teacher)(batch).metrics
    assert metrics["kl_incorrect"].isnan()
    assert (metrics["tokens_correct"], metrics["tokens_incorrect"]) == (20, 0)
    assert metrics["kl_correct"] == metrics["kl_mean"]
    for keys in ("response_mask", "teacher_response_mask"):
        batch[keys] = torch.zeros_like(batch[keys])
    objective = topd.TRD(student, teacher, topd.TRDConfig(**ALL))(batch)
    assert objective.loss == 0
    assert numbers(objective.metrics) == {}


def test_the_cross_entropy_is_no_part_of_the_divergence():
    student, teacher = models()
    plain, added = (
        topd.OPD(student, teacher, topd.OPDConfig("forward_kl", hard_weight=weight))(batch_of()).totals.metrics()
        for weight in (0.0, 0.7)
    )
    torch.testing.assert_close(added["kl_mean"], plain["kl_mean"], rtol=1e-12, atol=0)
    torch.testing.assert_close(added["kl_max"], plain["kl_max"], rtol=1e-12, atol=0)


def test_weights_of_tokens_change_no_diagnostic():
    student, teacher = models()
    weights = torch.rand(batch_of()["input_ids"].shape, dtype=torch.float64)
    plain, weighted = (topd.TRD(student, teacher)(batch_of() | extra) for extra in ({}, {"token_weights": weights}))
    assert numbers(weighted.metrics) == numbers(plain.metrics)


@pytest.mark.parametrize("method", [topd.TRD, topd.TOPD])
def test_totals_of_parts_add_up_to_the_whole(method):
    student, teacher = models()
    config = topd.TRDConfig(**ALL) if method is topd.TRD else topd.TOPDConfig(horizon=2, **ALL)
    batch = batch_of() if method is topd.TRD else same_prompts()
    batch["verdict"] = torch.arange(len(batch["input_ids"])) % 2 == 0
    objective = method(student.double(), teacher.double(), config)
    whole = objective(batch).totals
    parts = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(batch["verdict"]))]
    total = reduce(Totals.plus, [objective(part).totals for part in parts])
    torch.testing.assert_close(total.metrics(), whole.metrics(), rtol=1e-9, atol=0, equal_nan=True)


def test_a_teacher_known_by_its_topk_has_those_that_it_can():
    student, teacher = models()
    own = {key: value for key, value in batch_of().items() if not key.startswith("teacher_")}
    step = topd.OPD(student, None, topd.OPDConfig("forward_kl", position_clip=0.5))(with_topk(own, teacher, k=30))
    assert numbers(step.metrics).keys() == ALWAYS | {"clip_share"}
    known = step.scores.teacher_logprob.isfinite() & (own["response_mask"] > 0)
    for side in ("student", "teacher"):
        logprob = getattr(step.scores, f"{side}_logprob")[known]
        assert step.metrics[f"{side}_perplexity"].item() == pytest.approx(math.exp(-logprob.mean()), rel=1e-6)


def test_what_a_configuration_asks_of_the_teacher_costs_a_product_each():
    draw = torch.Generator().manual_seed(0)
    hidden = [torch.randn(1, N + 1, H, generator=draw) for _ in range(2)]
    heads = [topd.Head(torch.randn(V, H, generator=draw)) for _ in range(2)]
    response = torch.ones(1, N + 1, dtype=torch.bool)
    response[0, 0] = False
    inputs = Inputs(Padded(torch.zeros(1, N + 1, dtype=torch.int64), response, response))

    def products(**options):
        config = topd.OPDConfig(**options)
        sides = zip(hidden, heads, strict=True)
        return matrix_products(lambda: diagnosed(token_losses(*sides, inputs, config), inputs, config))

    plain = products()
    assert products(epistemic_ids=EPISTEMIC) == pytest.approx(plain + 1)
    assert products(teacher_top2=True) == pytest.approx(plain + 1)


def test_options_that_measure_nothing_are_refused():
    student, teacher = models()
    for name, value, error, message in (
        ("epistemic_ids", 3, TypeError, "epistemic_ids must be a list of ids, ints, got 3; topd.trd.epistemic_ids"),
        ("epistemic_ids", "ab", TypeError, "epistemic_ids must be a list of ids"),
        ("epistemic_ids", [], ValueError, r"must hold distinct ids >= 0, one at least, got \[\]"),
        ("epistemic_ids", [2, 2], ValueError, r"got \[2, 2\]; leave repeats out"),
        ("epistemic_ids", [-1], ValueError, r"got \[-1\]"),
        ("teacher_top2", 1, TypeError, "teacher_top2 must be"),
    ):
        with pytest.raises(error, match=message):
            topd.OPDConfig(**{name: value})
    with pytest.raises(ValueError, match="epistemic_ids must be among the 61 tokens that both models have, got 61; take topd"):
        topd.OPD(student, teacher, topd.OPDConfig(epistemic_ids=[61]))(batch_of())
    for options in ({"epistemic_ids": (3,)}, {"teacher_top2": True}):
        with pytest.raises(ValueError, match=rf"config\.{next(iter(options))} measures a teacher model's distributions, got"):
            topd.OPD(student, None, topd.OPDConfig(**options))
    assert topd.OPDConfig(epistemic_ids=[5, 3]).epistemic_ids == (5, 3)
