"""linear_logprobs and topk_logprobs on heads whose rows two or three processes share, against the truth on whole heads."""

import pytest
import torch
from compare import assert_near, assert_outcome
from logprob_cases import by_topd, plain
from shard_cases import assert_outcome_no_worse, starts_of, whole
from sharded_logprobs import CUTS, K, problems, upstream_of
from two_ranks import start

CASES = {name: rest for name, *rest in problems()}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return start("losses/sharded_logprobs.py", tmp_path_factory.mktemp("ranks"), timeout=120, ranks=request.param)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, ranks):
    vocab, problem, kind = CASES[name]
    for starts in starts_of(len(ranks), list(CASES).index(name), CUTS[vocab]):
        parts = [rank[torch.float64, name, starts] for rank in ranks]
        assert_outcome(whole(parts, starts, vocab), plain(problem, upstream_of(problem, kind)), 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_no_worse_than_one_process(name, ranks):
    vocab, problem, kind = CASES[name]
    problem, upstream = problem.to(torch.float32), upstream_of(problem, kind)
    for starts in starts_of(len(ranks), list(CASES).index(name), CUTS[vocab]):
        parts = [rank[torch.float32, name, starts] for rank in ranks]
        assert_outcome_no_worse(whole(parts, starts, vocab), by_topd(problem, "eager", upstream), plain(problem, upstream))


@pytest.mark.parametrize("name", [name for name, (*_, kind) in CASES.items() if kind == "of all"])
def test_the_likeliest_tokens(name, ranks):
    vocab, problem, _ = CASES[name]
    rows = problem.mask if problem.mask is not None else torch.ones(len(problem.ids), dtype=torch.bool)
    every = (problem.model.logits() / problem.temperature).log_softmax(-1)[rows]
    true, ids = every.topk(min(K, vocab), dim=-1)
    for starts in starts_of(len(ranks), list(CASES).index(name), CUTS[vocab]):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            (logprobs, mine), *others = (rank[dtype, name, starts]["topk"] for rank in ranks)
            assert all(torch.equal(logprobs, other[0]) and torch.equal(mine, other[1]) for other in others)
            if dtype == torch.float64:  # in float32 some are equal
                assert torch.equal(mine[rows], ids)
            assert_near(every.gather(-1, mine[rows]), true, tolerance)
            assert_near(logprobs[rows], true, tolerance)
            assert not mine[~rows].any()
            assert logprobs[~rows].isneginf().all()
