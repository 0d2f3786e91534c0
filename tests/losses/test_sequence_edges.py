"""A sequence that the ranks of a sharded head share, at the edges: uneven masks, nothing to do, upstream gradients that
deviate, what the ranks say to each other, and OPD over two halves of the columns."""

import pytest
import torch
from compare import CONSTANT, Outcome, assert_near, assert_outcome
from sequence_cases import whole
from sequence_edges import STARTS
from two_ranks import start


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("losses/sequence_edges.py", tmp_path_factory.mktemp("ranks"), timeout=120)


def assert_true(parts, vocab=41, tolerance=1e-12):
    """Check what the ranks have together against the truth that they bring."""
    assert_outcome(whole(parts, STARTS, vocab), Outcome(**parts[0]["truth"]), tolerance)


@pytest.mark.parametrize("number", range(3))
def test_ranks_have_different_numbers_of_unmasked_rows(number, ranks):
    parts = [rank["uneven_masks"]["each"][number] for rank in ranks]
    assert_true(parts)
    masked = parts[0]["truth"]["value"] == 0
    assert not torch.cat([part["scores"]["forward_kl"] for part in parts])[masked].any()


def test_nothing_to_do_ends_with_zeros(ranks):
    for rank in ranks:
        for results in rank["no_rows"]["grads"]:
            assert all(not result.any() for result in results.values())
            assert results["weight"].shape[1] == 7


@pytest.mark.parametrize("share", ["0 %", "3 %", "100 %", "wrong"])
def test_upstream_gradients_that_deviate(share, ranks):
    assert_true([rank["deviating"][share] for rank in ranks])


def test_rows_that_obey_are_not_computed_again(ranks):
    """A chunk has two gathers of hidden states and two of its sums; the plan that a second loop begins with is another."""
    none, some, all_of_them = (ranks[0]["deviating"][share]["said"]["all_gather"] for share in ("0 %", "3 %", "100 %"))
    chunks = ranks[0]["deviating"]["0 %"]["said"]["reduce_scatter_single"]
    assert chunks > 1
    assert none == 2 + 1 + 4 * chunks + 1
    assert some == none + 3 + 4
    assert all_of_them > some  # whose tiles, without scores, are narrower, so that chunks are fewer


def test_each_rank_may_send_another_upstream_gradient(ranks):
    assert_true([rank["own_scalars"] for rank in ranks])


def test_two_runs_and_two_backward_passes_are_equal(ranks):
    for rank in ranks:
        first, again, once, twice = rank["twice"]["each"]
        assert torch.equal(first["value"], again["value"])
        for name, grad in first["grads"].items():
            assert torch.equal(grad, again["grads"][name]), name
        assert once["weight"].any()
        assert torch.equal(twice["weight"], 2 * once["weight"])


@pytest.mark.parametrize("rows", ["all rows", "own rows"])
def test_sums_beside_the_next_chunk_have_the_bits_of_sums_that_are_waited_for(rows, ranks):
    for rank in ranks:
        assert rank["waiting"][rows, False].any()
        assert torch.equal(rank["waiting"][rows, False], rank["waiting"][rows, True])


def test_what_the_ranks_say_to_each_other(ranks):
    """Checks and plan; for each of three chunks both sides' hidden states, two gathers and a sum that nobody waits for at once.
    Backward: what came for the rows. Computed again: this, what the rows weigh, whether anew, the plan, and the chunks."""
    for rank in ranks:
        said = rank["collectives"]["own rows"]
        counts, asynchronous, rows = said["forward"]
        assert counts == {"all_gather": 2 + 3 * 4, "all_reduce": 0, "reduce_scatter_single": 3}
        assert asynchronous == {"all_gather": 3 * 2, "all_reduce": 0, "reduce_scatter_single": 3}
        assert rows == [2] * 6  # of a chunk of four rows: hidden states of a chunk alone travel at a time
        assert said["backward"][0] == {"all_gather": 1, "all_reduce": 0, "reduce_scatter_single": 0}
        assert said["redone"][0] == {"all_gather": 4 + 3 * 4, "all_reduce": 0, "reduce_scatter_single": 0}
        counts, asynchronous, _ = rank["collectives"]["all rows"]["forward"]
        assert counts == {"all_gather": 2 + 3 * 2, "all_reduce": 3, "reduce_scatter_single": 0}
        assert asynchronous == {"all_gather": 0, "all_reduce": 3, "reduce_scatter_single": 0}


@pytest.mark.parametrize("fault", ["own_terms_alone", "wrong_slice"])
def test_a_planted_fault_is_seen(fault, ranks):
    parts = [rank["planted_faults"][fault] for rank in ranks]
    together, true = whole(parts, STARTS, 41), parts[0]["truth"]
    assert_near(together.value, true["value"], 1e-12)
    assert_near(together.grads["weight"], true["grads"]["weight"], 1e-12)
    off, largest = (together.grads["hidden"] - true["grads"]["hidden"]).abs(), true["grads"]["hidden"].abs().max()
    assert off.max() > 1e-2 * largest
    with pytest.raises(AssertionError, match="gradient of hidden"):
        assert_true(parts)


def test_without_the_fault_all_is_right(ranks):
    assert_true([rank["planted_faults"]["adding_up_parts"] for rank in ranks])


def test_a_row_without_a_distribution_is_nan_where_it_belongs(ranks):
    together = whole([rank["a_row_without_a_distribution"] for rank in ranks], STARTS, 41)
    nan = torch.arange(12) == 8
    assert torch.equal(together.value.isnan(), nan)
    assert torch.equal(together.grads["hidden"].isnan().all(-1), nan)
    assert together.grads["weight"].isnan().all()


def test_piles_of_chunks(ranks):
    parts = [rank["piles"] for rank in ranks]
    together, true, alone = whole(parts, STARTS, 41), parts[0]["truth"], parts[0]["alone"]
    (pile, chunks), *_ = parts[0]["plans"]
    assert 1 < pile < chunks
    pairs = [(together.value, alone["value"], true["value"])]
    pairs += [(together.grads[name], alone["grads"][name], true["grads"][name]) for name in true["grads"]]
    for mine, one, expected in pairs:
        error, allowed = ((each.double() - expected).square().mean().sqrt() for each in (mine, one))
        assert error <= 1.1 * allowed + CONSTANT * expected.abs().max()


def test_opd_over_two_halves_of_the_columns(ranks):
    """Also where a response crosses the boundary."""
    for rank in ranks:
        results = rank["opd"]
        assert results["crosses"]
        assert_near(results["loss"], results["expected_loss"], 1e-12)
        assert_near(results["logprob"], results["expected_logprob"], 1e-12)
        assert torch.equal(results["scored"], results["logprob"])
        for name, expected in results["expected"].items():
            assert_near(results["grads"][name], expected, 1e-6, name)  # the models' norms compute in float32


def test_a_dtensor_and_a_teacher_that_is_resharded(ranks):
    parts = [rank["dtensors"] for rank in ranks]
    true = parts[0]["truth"]
    assert_near(torch.cat([part["value"] for part in parts]), true["value"], 1e-12)
    assert_near(torch.cat([part["grads"]["hidden"] for part in parts]), true["grads"]["hidden"], 1e-12)
    for part in parts:
        assert_near(part["grads"]["weight"], true["grads"]["weight"], 1e-12)


REFUSALS = {
    "rows": ("takes equally many rows on every rank of its group, got [6, 5] rows",) * 2,
    "heads": ("must agree in VocabShard.sequence_parallel, got True and False",) * 2,
    "ranks": ("must make the same call",) * 2,
    "tokens": ("refused on rank 1", "tokens must lie in [0, 41)"),
    "mask": ("must make the same call",) * 2,
    "small": ("workspace_bytes must hold at least one row",) * 2,
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_is_told(name, ranks):
    for rank, expected in zip(ranks, REFUSALS[name], strict=True):
        assert expected in rank["refusals"][name]
