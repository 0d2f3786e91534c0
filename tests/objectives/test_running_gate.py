"""gate="running_quantile": judged by the last candidates; and the warning where the gate of one call lets all through."""

import pytest
import torch
from objective_cases import batch_of, models
from topd_cases import FEW, GREEDY
from two_gates import CALLS
from two_ranks import start

import topd
from topd.objectives.gating import MEMORY, Gate


def test_the_literal_rule():
    reference = torch.tensor([0.1, 0.4, 0.2, 0.3])
    distance = torch.tensor([0.1, 0.2, 0.25])
    for value, expected in ((0.0, [1, 1, 1]), (0.3, [0, 1, 1]), (0.5, [0, 0, 1]), (1.0, [0, 0, 0])):
        real = topd.divergent(distance, rule="running_quantile", value=value, reference=reference)
        assert real.tolist() == [bool(each) for each in expected]
    with pytest.raises(ValueError, match='reference must be given where rule is "running_quantile"'):
        topd.divergent(distance, rule="running_quantile")
    with pytest.raises(ValueError, match="reference must be left out where rule is"):
        topd.divergent(distance, reference=reference)


def test_it_remembers_each_candidate_once_and_the_last_alone():
    whole, parts = Gate("running_quantile", None), Gate("running_quantile", None)
    distances = torch.rand(40)
    own = whole(distances)
    assert (own.candidates, own.points, own.items) == (40, own.divergent.sum(), None)
    assert torch.equal(own.divergent, topd.divergent(distances))
    for part in distances.split(5):
        parts(part)
    assert torch.equal(whole.state_dict()["distances"], parts.state_dict()["distances"])
    with torch.no_grad():
        assert not whole(torch.zeros(3)).divergent.any()
    assert torch.equal(whole.state_dict()["distances"], distances)
    resumed = Gate("running_quantile", None)
    resumed.load_state_dict(whole.state_dict())
    more = torch.rand(2 * MEMORY)
    assert torch.equal(resumed(more).divergent, whole(more).divergent)
    assert torch.equal(resumed.state_dict()["distances"], more[-MEMORY:])


def test_the_objective_keeps_it_and_warns_of_a_gate_that_lets_all_through():
    student, teacher = models()
    few = {**FEW, **GREEDY, "candidate_value": 1}
    objective = topd.TOPD(student, teacher, topd.TOPDConfig(**few, gate="running_quantile"))
    for _ in range(2):
        objective(batch_of())
    assert objective.state_dict()["distances"].shape == (6,)
    assert topd.TOPD(student, teacher).state_dict() == {}
    one = topd.TOPD(student, teacher, topd.TOPDConfig(**few))
    with pytest.warns(UserWarning, match='gate "lowest_fraction_out" lets all 3 candidates'):
        one(batch_of())
    one(batch_of())  # a second warning would be an error


@pytest.mark.slow
def test_two_processes_remember_the_same(tmp_path):
    """Also where one has no candidate."""
    ranks = start("objectives/two_gates.py", tmp_path, timeout=120)
    single = Gate("running_quantile", 0.5)
    expected = torch.cat([single(torch.tensor([*first, *second])).divergent for first, second in CALLS])
    for rank in ranks:
        assert torch.equal(rank["distances"], single.state_dict()["distances"])
    assert torch.equal(torch.cat([rank["real"] for rank in ranks]).sort().values, expected.sort().values)
