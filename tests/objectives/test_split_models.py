"""Objectives of models that tensor parallelism has split over two ranks: as in one process, in steps and in windows."""

import pytest
import torch
from compare import assert_near
from split_cases import OPD, TOPD, both, opd_of, steps_with_topk, three_steps, topd_steps
from split_models import WINDOWS, sampled
from two_ranks import start


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("objectives/split_models.py", tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.mark.parametrize("name", OPD)
def test_three_steps_of_opd_are_those_of_one_process(name, ranks):
    """Of "jsd" the embeddings are split too; of "unequal" the teacher's rows have to move first."""
    expected = three_steps(opd_of(name, *both(name)))
    assert torch.equal(ranks[0][name]["losses"], ranks[1][name]["losses"])
    for rank in ranks:
        assert_near(rank[name]["losses"], expected["losses"], 1e-10, "losses")
        assert_near(rank[name]["parameters"], expected["parameters"], 1e-10, "parameters")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_three_steps_with_a_teachers_topk_are_those_of_one_process(divergence, ranks):
    expected = steps_with_topk(divergence, both("opd")[0])
    for rank in ranks:
        assert_near(rank[f"topk {divergence}"]["losses"], expected["losses"], 1e-10, "losses")
        assert_near(rank[f"topk {divergence}"]["parameters"], expected["parameters"], 1e-10, "parameters")


@pytest.mark.parametrize("models", WINDOWS)
def test_windows_are_the_same_on_all_ranks(models, ranks):
    """Also where a rank's generator is in another state: those of one process with rank 0's."""
    expected = sampled(*both(models), seed=7)
    other = sampled(*both(models), seed=8)
    for noise, tokens in expected.items():
        assert not torch.equal(other[noise], tokens)
        for rank in ranks:
            assert torch.equal(rank["windows"][models][noise], tokens), noise


def test_a_models_head_is_its_rows_here(ranks):
    assert [rank["head"] for rank in ranks] == [
        {"start": 0, "rows": 31, "vocab": 61},
        {"start": 31, "rows": 30, "vocab": 61},
    ]


def test_a_teacher_that_is_cut_elsewhere_is_moved_once(ranks):
    assert all(rank["moved"] for rank in ranks)


@pytest.mark.parametrize("name", TOPD)
def test_three_steps_of_topd_are_those_of_one_process(name, ranks):
    """Of "greedy" and "mismatch" the embeddings are split too. The ranks' generators are in other states."""
    expected = topd_steps(name, *both("opd"), seed=5)
    for rank in ranks:
        assert_near(rank["topd"][name]["losses"], expected["losses"], 1e-10, "losses")
        assert_near(rank["topd"][name]["parameters"], expected["parameters"], 1e-10, "parameters")


def test_three_steps_of_topd_whose_layers_alone_are_split(ranks):
    expected = topd_steps("sampled", *both("opd"), seed=5)
    for rank in ranks:
        assert_near(rank["layers"]["losses"], expected["losses"], 1e-10, "losses")
        assert_near(rank["layers"]["parameters"], expected["parameters"], 1e-10, "parameters")


def test_a_group_with_ranks_that_share_a_head_is_refused(ranks):
    for rank in ranks:
        assert "process_group must hold one of the ranks that share the student's head, [0, 1]" in rank["refused"]


def test_context_parallel_is_refused(ranks):
    for rank in ranks:
        messages = rank["context"]
        for name in ("topd", "sample_windows", "window_hidden"):
            assert "TOPD's windows must branch off whole rollouts" in messages[name]
        assert "a packed batch must hold whole sequences" in messages["packed"]
        assert messages["afterwards"] == "no error"
