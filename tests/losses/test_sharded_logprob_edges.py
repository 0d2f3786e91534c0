"""linear_logprobs and topk_logprobs on sharded heads at the edges: peaked rows, nothing to do, what is refused, what the ranks
say to each other."""

import pytest
import torch
from compare import CONSTANT, Outcome, assert_near, assert_outcome
from shard_cases import ROWS_OF, whole
from sharded_logprob_edges import STARTS
from two_ranks import start


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("losses/sharded_logprob_edges.py", tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.mark.parametrize("name", ["alone", "two"])
def test_a_peaked_row_keeps_its_digits(name, ranks):
    """d log p / d hidden is the sum over the others of p_v (w - w_v), here 27 times their mass."""
    outside = 63 * torch.tensor(-27.0, dtype=torch.float64).exp()
    for rank in ranks:
        result = rank["peaked"][name]
        assert_near(result["value"].double(), -outside.log1p().reshape(1), 1e-5)
        assert_near(result["hidden"].double(), (27 * outside / (1 + outside)).reshape(1), 1e-5)
        assert_near(result["entropy"].double(), (outside.log1p() + 27 * outside / (1 + outside)).reshape(1), 1e-5)


def test_absent_tokens(ranks):
    """A chosen token of probability 0 has log-probability -inf; it still gets its upstream gradient."""
    parts = [rank["absent_tokens"] for rank in ranks]
    truth, together = parts[0]["truth"], whole(parts, STARTS, 41)
    absent = truth["value"].isneginf()
    assert absent[:4, 0].all()
    assert torch.equal(together.value.isneginf(), absent)
    assert_near(together.value[~absent], truth["value"][~absent], 1e-12)
    for name, true in truth["grads"].items():
        assert_near(together.grads[name], true, 1e-12, name)
    for part in parts:
        assert part["logprobs"][:, :22].isfinite().all()
        assert part["logprobs"][:, 22:].isneginf().all()
        assert (part["ids"] >= 0).all()
        assert all(len(row.unique()) == 25 for row in part["ids"])


@pytest.mark.parametrize("name", ["used", "used by several", "unused"])
def test_a_row_without_a_distribution(name, ranks):
    """It is NaN, and so are the gradients that it has a part in, as with one process."""
    parts = [rank["lost_row"][name] for rank in ranks]
    truth = parts[0]["truth"]
    rows = [slice(0, 23), slice(23, 41)]
    for part, mine in zip(parts, rows, strict=True):
        pairs = [(part["value"], truth["value"])]
        for key, true in truth["grads"].items():
            grad = part["grads"][key][: mine.stop - mine.start] if key in ROWS_OF else part["grads"][key]
            pairs.append((grad, true[mine] if key in ROWS_OF else true))
        for value, true in pairs:
            torch.testing.assert_close(value, true, rtol=1e-11, atol=1e-11, equal_nan=True)
    assert truth["value"][5].isnan().all()
    assert truth["grads"]["weight"].isnan().any() == (name != "unused")


def test_hints_may_differ_on_the_ranks(ranks):
    """Rows that deviate on one rank are computed again on both. d a is exact on each, but for its last bits, in which the sums
    under other hints differ."""
    parts = [rank["other_hints"] for rank in ranks]
    for part in parts:
        assert_near(part["grads"].pop("a"), part["truth"]["grads"].pop("a"), 1e-12)
    assert_outcome(whole(parts, STARTS, 41), Outcome(**parts[0]["truth"]), 1e-12)


def test_nothing_to_do_ends_with_zeros(ranks):
    for rank in ranks:
        for results in rank["no_rows"]["results"]:
            assert all(not result.any() for result in results.values())
            assert results["weight"].shape[1] == 7


@pytest.mark.parametrize("m", [1, 3])
def test_a_second_backward_gives_the_same(m, ranks):
    for rank in ranks:
        results = rank["second_backward"][m]
        assert results["once"].any()
        assert torch.equal(results["twice"], 2 * results["once"])


def test_two_runs_give_the_same_bits(ranks):
    for rank in ranks:
        first, second = rank["two_runs"]["runs"]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("value", "hidden", "a"):
        assert torch.equal(*(rank["two_runs"]["runs"][0][name] for rank in ranks))


def test_gradcheck_in_double(ranks):
    assert all(rank["gradcheck"]["passed"] for rank in ranks)


def test_what_the_ranks_say_to_each_other(ranks):
    """Forward: one exchange of checks, one of the plan; then for each of three chunks a gather, one more for the entropy, and a
    sum of u, of the ids' rows, of the entropy's u. Backward of a sum: none. Else: which rows deviate, whether anew, the plan,
    and a gather for each of their chunks; of several ids a sum of their rows. Numbers are (gathers, sums)."""
    for rank in ranks:
        counts = rank["collectives"]
        assert counts[1, False] == [(2 + 3, 3 * 2), (0, 0), (3 + 3, 0)]
        assert counts[3, False] == [(2 + 3, 3 * 2), (0, 0), (3 + 3, 1)]
        assert counts[3, True] == [(2 + 3 * 2, 3 * 3), (0, 0), (3 + 3, 1)]
        assert counts["topk"] == (2 + 3, 0)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_gradient_without_the_other_shards_is_seen(name, ranks):
    for rank in ranks:
        fault = rank["planted_faults"][name]
        assert_near(*fault["value"], 1e-12)
        for key in ("hidden", "a"):
            true = fault["truth"][key]
            assert (fault["grads"][key] - true).abs().max() > 1e-2 * true.abs().max(), key


def test_a_dtensor_becomes_a_sharded_head(ranks):
    for rank in ranks:
        results = rank["dtensors"]
        assert_outcome(Outcome(results["value"], results["grads"]), Outcome(**results["truth"]), 1e-12)


def test_bfloat16(ranks):
    parts = [rank["bfloat16"] for rank in ranks]
    truth, together = parts[0]["truth"], whole(parts, STARTS, 41)
    assert_near(together.value, truth["value"].double(), CONSTANT)
    for name, true in truth["grads"].items():
        assert together.grads[name].dtype == torch.bfloat16
        assert_near(together.grads[name], true.double(), 2**-8, name)


def test_equal_logits_stand_in_the_order_of_the_ranks(ranks):
    for rank in ranks:
        assert (rank["ties"]["ids"][:, :23] < 23).all()
        assert (rank["ties"]["ids"][:, 23:] >= 23).all()
        assert_near(rank["ties"]["logprobs"].double(), -torch.full((2, 30), 41.0).double().log(), 1e-6)


REFUSALS = {
    "ids outside": ("refused on rank 1", "ids must lie in [0, 41)"),
    "other ids": ("must make the same call",) * 2,
    "more ids": ("must make the same call",) * 2,
    "temperature": ("refused on rank 1", "temperature must be finite and > 0"),
    "states": ("hidden states must be the same on every rank",) * 2,
    "backend": ('backend must be None or "eager" with a sharded head',) * 2,
    "reference": ('backend must be None or "eager" with a sharded head',) * 2,
    "sequence": ("must make the same call",) * 2,
    "k": ("k must be at most the vocabulary's 41 entries, got 42",) * 2,
    "other k": ("must make the same call",) * 2,
    "targets": ("refused on rank 1", "target_probs must sum to 1"),
    "topk": ("refused on rank 1", "teacher_logprobs must"),
    "plan": ("refused on rank 1", "plan must be finite and >= 0"),
    "small": ("workspace_bytes must hold at least one row",) * 2,
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_is_told(name, ranks):
    for rank, expected in zip(ranks, REFUSALS[name], strict=True):
        assert expected in rank["refusals"][name]
