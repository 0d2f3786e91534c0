"""Both trainers under FSDP2 by accelerate on two ranks, student and teacher sharded: three steps are those of one process."""

import pytest
from compare import assert_near
from two_ranks import start

for host in ("transformers", "accelerate", "trl", "datasets"):
    pytest.importorskip(host)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("integrations/fsdp2_trainer_ranks.py", tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.mark.parametrize("place", [None, "own unit"], ids=["whole teacher", "sharded teacher"])
@pytest.mark.parametrize("method", ["opd", "topd"])
@pytest.mark.parametrize("trainer", ["trained", "trained_by_trl"])
def test_three_steps_are_those_of_one_process(ranks, tmp_path, trainer, method, place):
    import fsdp2_trainer_ranks
    from fsdp2_trainer_ranks import flat

    _, student, loss = getattr(fsdp2_trainer_ranks, trainer)(method, tmp_path, gradient_accumulation_steps=4)
    for rank in ranks:
        assert_near(rank[trainer, method, place]["parameters"], flat(student).double(), 1e-9)
        assert rank[trainer, method, place]["loss"] == pytest.approx(loss)


def test_the_trainer_samples_under_fsdp2(ranks):
    first, second = (rank["sampled"] for rank in ranks)
    assert (first["parameters"] == second["parameters"]).all()
    assert first["log"]["loss"] > 0
    assert first["log"]["candidates"] > 0
