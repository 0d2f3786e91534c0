"""linear_divergence and score_tokens on heads whose rows two to four processes share, against the truth on whole heads."""

from functools import cache

import pytest
import torch
from compare import assert_outcome
from shard_cases import assert_no_worse, assert_outcome_no_worse, whole
from shard_problems import VOCABS, assert_scores, cases
from sharded_divergences import N, cases_of
from two_ranks import start

CASES = cases(N)


GROUPS = [(ranks, name) for ranks in (2, 3, 4) for name in cases_of(ranks)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank has, by dtype, name and the first tokens of the ranks; a function of the number of ranks."""

    @cache
    def of(ranks):
        return start("losses/sharded_divergences.py", tmp_path_factory.mktemp("ranks"), timeout=120, ranks=ranks)

    return of


def parts_of(ranks, dtype, name):
    """Yield the first tokens of the ranks, and what each rank has."""
    cuts = [starts for each, other, starts in ranks[0] if (each, other) == (dtype, name)]
    assert cuts
    for starts in cuts:
        yield starts, [rank[dtype, name, starts] for rank in ranks]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_has_tokens_but_the_last_of_few(ranks, results):
    """Of the cases: a rank without tokens among four, uneven parts, and every vocabulary with every option."""
    assert {case.vocab for case in CASES.values()} == {*VOCABS, 5003}
    last = {starts for _, name, starts in results(ranks)[0] if " 5 " in name}
    assert last == {2: {(0, 3)}, 3: {(0, 2, 4)}, 4: {(0, 2, 4, 5)}}[ranks]


@pytest.mark.parametrize(("ranks", "name"), GROUPS)
def test_values_gradients_and_scores(ranks, name, results):
    case = CASES[name]
    for starts, parts in parts_of(results(ranks), torch.float64, name):
        assert_outcome(whole(parts, starts, len(case.problem.student.weight)), case.truth, 1e-12)
        for field in ("scores", "scored") if "scored" in parts[0] else ("scores",):
            for part in parts:
                assert all(torch.equal(part[field][key], value) for key, value in parts[0][field].items()), field
            assert_scores(parts[0][field], case.true_scores(torch.float64))


@pytest.mark.parametrize(("ranks", "name"), GROUPS)
def test_float32_is_no_worse_than_one_process(ranks, name, results):
    case, true = CASES[name], CASES[name].rounded_truth
    single, scores = case.alone
    for starts, parts in parts_of(results(ranks), torch.float32, name):
        together = whole(parts, starts, len(case.problem.student.weight))
        assert_outcome_no_worse(together, single, true)
        for key, expected in case.true_scores(torch.float32).items():
            for field in ("scores", "scored") if "scored" in parts[0] else ("scores",):
                assert_no_worse(parts[0][field][key], getattr(scores, key), expected, key)
                assert all(torch.equal(part[field][key], parts[0][field][key]) for part in parts), key
