"""linear_divergence and score_tokens on heads whose rows two or three processes share, against the truth on whole heads."""

import pytest
import torch
from compare import CONSTANT, assert_near, assert_outcome, by_topd, plain
from score_truth import true_scores
from shard_cases import problems, starts_of, whole
from sharded_divergences import UPSTREAMS
from two_ranks import start

CASES = dict(problems())


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return start("losses/sharded_divergences.py", tmp_path_factory.mktemp("ranks"), timeout=120, ranks=request.param)


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_scores(name, ranks):
    problem = CASES[name]
    for starts in starts_of(len(ranks), list(CASES).index(name)):
        parts = [rank[torch.float64, name, starts] for rank in ranks]
        upstream = UPSTREAMS[parts[0]["upstream"]](11)
        truth, together = plain(problem, upstream), whole(parts, starts, problem.student.weight.shape[0])
        assert_outcome(together, truth, 1e-12)
        for field, true in true_scores(problem).items():
            assert all(torch.equal(part["scores"][field], parts[0]["scores"][field]) for part in parts), field
            assert_near(parts[0]["scores"][field].double(), true.double(), 1e-12, field)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_no_worse_than_one_process(name, ranks):
    problem = CASES[name].to(torch.float32)
    for starts in starts_of(len(ranks), list(CASES).index(name)):
        parts = [rank[torch.float32, name, starts] for rank in ranks]
        upstream = UPSTREAMS[parts[0]["upstream"]](11)
        truth, single = plain(problem, upstream), by_topd(problem, "eager", upstream)
        together = whole(parts, starts, problem.student.weight.shape[0])
        pairs = [(together.value, single.value, truth.value)]
        pairs += [(together.grads[key], single.grads[key], truth.grads[key]) for key in truth.grads]
        for mine, one, true in pairs:
            error, allowed = (mine.double() - true).abs(), (one.double() - true).abs()
            assert (error <= allowed + CONSTANT * true.abs().max()).all()
