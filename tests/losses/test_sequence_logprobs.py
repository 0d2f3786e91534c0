"""linear_logprobs, topk_logprobs and what is made of them where two or three processes share the vocabulary and the sequence,
against the truth on whole heads and all rows."""

import pytest
import torch
from compare import Outcome, assert_near, assert_outcome
from logprob_cases import by_topd, plain
from sequence_cases import starts_of, whole
from shard_cases import assert_outcome_no_worse
from sharded_logprobs import K, problems, upstream_of
from two_ranks import start

CASES = {name: rest for name, *rest in problems()}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return start("losses/sequence_logprobs.py", tmp_path_factory.mktemp("ranks"), timeout=120, ranks=request.param)


def together_of(parts, vocab):
    return whole(parts, starts_of(len(parts), vocab), vocab)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, ranks):
    vocab, problem, kind = CASES[name]
    together = together_of([rank["options"][torch.float64, name] for rank in ranks], vocab)
    assert_outcome(together, plain(problem, upstream_of(problem, kind)), 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_no_worse_than_one_process(name, ranks):
    vocab, problem, kind = CASES[name]
    problem, upstream = problem.to(torch.float32), upstream_of(problem, kind)
    together = together_of([rank["options"][torch.float32, name] for rank in ranks], vocab)
    assert_outcome_no_worse(together, by_topd(problem, "eager", upstream), plain(problem, upstream))


@pytest.mark.parametrize("name", CASES)
def test_the_likeliest_tokens(name, ranks):
    vocab, problem, _ = CASES[name]
    rows = problem.mask if problem.mask is not None else torch.ones(len(problem.ids), dtype=torch.bool)
    every = (problem.model.logits() / problem.temperature).log_softmax(-1)[rows]
    true, ids = every.topk(min(K, vocab), dim=-1)
    logprobs, mine = (
        torch.cat(each) for each in zip(*(rank["options"][torch.float64, name]["topk"] for rank in ranks), strict=True)
    )
    assert torch.equal(mine[rows], ids)
    assert_near(logprobs[rows], true, 1e-12)
    assert not mine[~rows].any()
    assert logprobs[~rows].isneginf().all()


COMPOSITIONS = [f"{direction} {support}" for direction in ("forward", "reverse") for support in ("raw", "renormalised", "tail")]
COMPOSITIONS += ["soft targets", "entropy aware", "guidance"]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_losses_that_are_made_of_it(name, ranks):
    parts = [rank["compositions"][name] for rank in ranks]
    assert_outcome(together_of(parts, 41), Outcome(**parts[0]["truth"]), 1e-11)


@pytest.mark.parametrize("name", ["log-probabilities", "entropy", "one each"])
def test_ranks_that_use_other_results(name, ranks):
    parts = [rank["other_results"][name] for rank in ranks]
    assert_outcome(together_of(parts, 41), Outcome(**parts[0]["truth"]), 1e-12)


def test_few_rows(ranks):
    for number, rank in enumerate(ranks):
        nothing, some = rank["few_rows"]["results"]
        assert nothing["value"].shape == (0, 2)
        assert nothing["ids"].shape == (0, 3)
        assert not any(each.any() for each in nothing.values())
        assert some["value"].any() == (number > 0)
        assert some["hidden"].any() == (number > 0)
        assert some["weight"].any()


def test_what_the_ranks_say_to_each_other(ranks):
    """More than with all rows on every rank: a gather of the states, one of the ids, one of the gradients that come."""
    for rank in ranks:
        own, everything = rank["collectives"][True], rank["collectives"][False]
        more = [(mine[0] - other[0], mine[1] - other[1]) for mine, other in zip(own, everything, strict=True)]
        assert more == [(2, 0), (1, 0), (1, 0)]


def test_two_runs_give_the_same_bits(ranks):
    for rank in ranks:
        first, second = rank["two_runs"]["runs"]
        assert torch.equal(first["value"], second["value"])
        assert all(torch.equal(grad, second["grads"][name]) for name, grad in first["grads"].items())


REFUSALS = {
    "rows": "takes equally many rows on every rank of its group",
    "ids": "ids must lie in [0, 41)",
    "mask": "must make the same call",
    "k": "must make the same call",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_is_told(name, ranks):
    *others, last = (rank["refusals"][name] for rank in ranks)
    assert REFUSALS[name] in last
    assert all((f"refused on rank {len(others)}" if name == "ids" else REFUSALS[name]) in each for each in others)
