"""An evaluation by two ranks counts each row once, also those that the sampler repeats so that both have equally many."""

import pytest
from diagnostics_cases import diagnostics_of
from two_ranks import start

for host in ("transformers", "accelerate", "trl", "datasets"):
    pytest.importorskip(host)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("integrations/evaluation_ranks.py", tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    from evaluation_ranks import everything

    return everything(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("way", ["pairs", "packed", "sampled", "trl"])
def test_diagnostics_are_those_of_one_process(ranks, expected, way):
    own = diagnostics_of(expected[way], "eval_")
    assert own["kl_mean"] > 0
    for rank in ranks:
        assert diagnostics_of(rank[way], "eval_") == pytest.approx(own, rel=1e-9)


@pytest.mark.parametrize("way", ["pairs", "packed", "sampled"])
def test_losses_and_means_are_those_of_one_process(ranks, expected, way):
    for name in ("eval_loss", "eval_opd_loss", "eval_tokens", "eval_student_entropy", "eval_teacher_entropy"):
        for rank in ranks:
            assert rank[way][name] == pytest.approx(expected[way][name], rel=1e-6), name
