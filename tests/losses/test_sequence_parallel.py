"""linear_divergence and its scores where two to four processes share the vocabulary and the sequence, against the truth on
whole heads and all rows."""

import pytest
import torch
from compare import assert_near, assert_outcome, by_topd, plain
from score_truth import true_scores
from sequence_cases import problems, starts_of, whole
from sequence_parallel import weights_of, wide_cases
from shard_cases import assert_no_worse, assert_outcome_no_worse
from shard_problems import assert_scores
from two_ranks import start

CASES = {name: (number, problem) for number, (name, problem) in enumerate(problems())}


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    return start("losses/sequence_parallel.py", tmp_path_factory.mktemp("ranks"), timeout=120, ranks=request.param)


def together_of(ranks, problem, dtype, name):
    own, other = (model.weight.shape[0] for model in (problem.student, problem.teacher))
    return whole([rank[dtype, name] for rank in ranks], starts_of(len(ranks), min(own, other)), own)


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_scores(name, ranks):
    number, problem = CASES[name]
    _, upstream, _ = weights_of(number)
    assert_outcome(together_of(ranks, problem, torch.float64, name), plain(problem, upstream), 1e-12)
    for field, true in true_scores(problem).items():
        mine = torch.cat([rank[torch.float64, name]["scores"][field] for rank in ranks])
        assert_near(mine.double(), true.double(), 1e-12, field)


@pytest.mark.parametrize("ranks", [2, 3], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_float32_is_no_worse_than_one_process(name, ranks):
    number, problem = CASES[name]
    problem, (_, upstream, hint) = problem.to(torch.float32), weights_of(number)
    truth, single = plain(problem, upstream), by_topd(problem, "eager", upstream, weights_hint=hint)
    together = together_of(ranks, problem, torch.float32, name)
    assert_outcome_no_worse(together, single, truth)


WIDE = wide_cases()


@pytest.mark.parametrize("ranks", [4], indirect=True)
@pytest.mark.parametrize("name", WIDE)
def test_large_vocabularies_and_logits_of_minus_infinity(name, ranks):
    """In float64, and in float32 no worse than one process; scores too."""
    case = WIDE[name]
    wide, (single, scores) = len(case.problem.student.weight), case.alone
    starts = starts_of(4, case.vocab)
    double, rounded = ([rank[dtype, name] for rank in ranks] for dtype in (torch.float64, torch.float32))
    assert_outcome(whole(double, starts, wide), case.truth, 1e-12)
    mine = {field: torch.cat([part["scores"][field] for part in double]) for field in double[0]["scores"]}
    assert_scores(mine, case.true_scores(torch.float64))
    assert_outcome_no_worse(whole(rounded, starts, wide), single, case.rounded_truth)
    for field, expected in case.true_scores(torch.float32).items():
        assert_no_worse(torch.cat([part["scores"][field] for part in rounded]), getattr(scores, field), expected, field)
