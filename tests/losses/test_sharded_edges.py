"""Sharded heads at the edges: peaked and near-equal rows, nothing to do, what is refused, what the ranks say to each other."""

import pytest
import torch
from compare import Outcome, assert_near, assert_outcome
from shard_cases import whole
from sharded_edges import STARTS
from two_ranks import start


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("losses/sharded_edges.py", tmp_path_factory.mktemp("ranks"), timeout=120)


def test_a_tiny_divergence_keeps_its_digits(ranks):
    for name in ("forward", "reverse"):
        mine, other = (rank["near_equal"][name] for rank in ranks)
        student, teacher = (ranks[0]["near_equal"][side].double().T.log_softmax(-1) for side in ("weight", "other"))
        p, q = (teacher, student) if name == "forward" else (student, teacher)
        true = (p.exp() * (p - q)).sum(-1)
        assert 1e-9 < true.median() < 1e-8
        assert torch.equal(mine, other)
        assert (mine > 0).all()
        assert ((mine.double() - true).abs() / true).median() < 2e-6


def test_a_peaked_row_keeps_its_digits(ranks):
    outside = 63 * torch.tensor(-27.0, dtype=torch.float64).exp()
    for rank in ranks:
        logprob = rank["peaked"]["logprob"].double()
        assert_near(logprob, -outside.log1p().reshape(1), 1e-5)


def test_absent_tokens(ranks):
    parts = [rank["absent_tokens"] for rank in ranks]
    assert_outcome(whole(parts, STARTS, 41), Outcome(**parts[0]["truth"]), 1e-12)
    assert all(part["reverse"].isposinf().all() for part in parts)


def test_nothing_to_do_ends_with_zeros(ranks):
    for rank in ranks:
        for results in rank["no_rows"]["grads"]:
            assert all(not result.any() for result in results.values())
            assert results["weight"].shape[1] == 7


def test_a_second_backward_gives_the_same(ranks):
    for rank in ranks:
        results = rank["second_backward"]
        assert results["once"].any()
        assert torch.equal(results["twice"], 2 * results["once"])


def test_gradcheck_in_double(ranks):
    assert all(rank["gradcheck"]["passed"] for rank in ranks)


def test_what_the_ranks_say_to_each_other(ranks):
    """One exchange of checks, one of the plan; then for each of three chunks two gathers and one sum. Backward: none; where
    rows are computed again: which rows, whether anew, the plan, and their chunks."""
    for rank in ranks:
        counts = rank["collectives"]
        assert counts["forward"] == {"all_gather": 2 + 3 * 2, "all_reduce": 3}
        assert counts["backward"] == {"all_gather": 0, "all_reduce": 0}
        assert counts["redone"] == {"all_gather": 3 + 3 * 2, "all_reduce": 0}


def test_what_travels_of_a_row(ranks):
    """Of every divergence a chunk has one gather of at most 48 bytes, one of partial sums and one reduction; an adapter's
    gradient is reduced once. The backward pass of a loss that gives each row the same sends nothing. The two gathers before
    are the checks and the plan."""
    for rank in ranks:
        for divergence, said in rank["bytes_of_a_row"].items():
            statistics, sums = said["sent"]
            assert 24 <= statistics <= 48, divergence
            assert sums <= 28, divergence
            assert said["forward"] == {"all_gather": 4, "all_reduce": 2}, divergence
            assert said["backward"] == [{"all_gather": 0, "all_reduce": 0}] * 2, divergence


@pytest.mark.parametrize("share", ["0 %", "3 %", "100 %", "wrong"])
def test_upstream_gradients_that_deviate(share, ranks):
    parts = [rank["deviating"][share] for rank in ranks]
    assert_outcome(whole(parts, STARTS, 41), Outcome(**parts[0]["truth"]), 1e-12)


def test_rows_that_obey_are_not_computed_again(ranks):
    """One gather tells which rows deviate; then the plan, and two for each chunk of these rows alone."""
    for rank in ranks:
        gathers = {share: rank["deviating"][share]["gathers"] for share in ("0 %", "3 %", "100 %", "wrong")}
        assert gathers["0 %"] == 1
        assert gathers["3 %"] == 3 + 2
        assert gathers["100 %"] == gathers["wrong"] > gathers["3 %"]


def test_two_runs_are_equal_bit_for_bit(ranks):
    for rank in ranks:
        for first, again in rank["two_runs"]["each"]:
            assert first.keys() == again.keys()
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("name", ["hidden", "a"])
def test_a_gradient_without_the_other_shards_is_seen(name, ranks):
    """The values stay exact, and the comparison of the other tests fails."""
    parts = [rank["planted_faults"][name] for rank in ranks]
    for part in parts:
        true = part["truth"]["grads"][name]
        assert_near(part["value"], part["truth"]["value"], 1e-12)
        assert (part["grads"][name] - true).abs().max() > 1e-2 * true.abs().max()
    with pytest.raises(AssertionError, match=rf"^{name}$"):
        assert_outcome(whole(parts, STARTS, 41), Outcome(**parts[0]["truth"]), 1e-12)


def test_a_dtensor_becomes_a_sharded_head(ranks):
    for number, rank in enumerate(ranks):
        results = rank["dtensors"]
        assert results["start"] == 21 * number
        assert_outcome(Outcome(results["value"], results["grads"]), Outcome(**results["truth"]), 1e-12)
        columns, mixed = results["refusals"]
        assert "exactly one Shard(0)" in columns
        assert "full_tensor()" in columns
        assert "Head.bias must be a plain tensor" in mixed


def test_a_teacher_is_resharded_like_the_student(ranks):
    for number, rank in enumerate(ranks):
        results = rank["resharded"]
        assert "teacher.resharded(like=student)" in results["refusal"]
        assert results["start"] == STARTS[number]
        assert_near(results["value"], results["truth"]["value"], 1e-12)


REFUSALS = {
    "rows": ("takes the same rows on every rank",) * 2,
    "states": ("hidden states must be the same on every rank",) * 2,
    "mask": ("takes the same unmasked rows on every rank",) * 2,
    "options": ("must make the same call",) * 2,
    "whole": ("must be sharded over one group",) * 2,
    "gap": ("rank 1 begins at 23 where the ranks before it end at 3",) * 2,
    **{
        name: (f"backend must be None or \"eager\" with a sharded head, got '{name}'",) * 2
        for name in ("reference", "cpp", "triton")
    },
    "small": ("workspace_bytes must hold at least one row",) * 2,
    "temperature": ("refused on rank 1", "temperature must be finite and > 0"),
    "tokens": ("refused on rank 1", "tokens must lie in [0, 41)"),
    "flags": ("student and teacher must agree in VocabShard.sequence_parallel, got False and True",) * 2,
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_is_told(name, ranks):
    for rank, expected in zip(ranks, REFUSALS[name], strict=True):
        assert expected in rank["refusals"][name]
