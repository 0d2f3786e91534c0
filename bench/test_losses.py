"""Time of value plus gradients: `pytest bench -k "reverse_kl and trainable"`."""

import pytest

from topd_bench.agreement import is_wrong, limits_of, whole_truth
from topd_bench.cases import CASES, make_inputs
from topd_bench.losses import LOSSES, Workload
from topd_bench.peers import PEERS
from topd_bench.peers.floor import floor
from topd_bench.request import DTYPES, HEADS


@pytest.fixture(scope="module", params=[(loss, head) for loss in LOSSES for head in HEADS], ids="-".join)
def workload(request: pytest.FixtureRequest) -> Workload:
    """Return one loss and head of the shape."""
    loss, head = request.param
    dtype = DTYPES[request.config.getoption("--dtype")]
    case = CASES[request.config.getoption("--shape")]
    return Workload.of(make_inputs(case, trainable_head=head == "trainable").to(dtype), loss)


@pytest.mark.parametrize("peer", ["floor", *PEERS])
def test_loss(benchmark, request, workload, peer):  # type: ignore[no-untyped-def]
    """Time a peer, after its result was held against float64."""
    benchmark.group = f"{workload.loss}, {'trainable' if workload.inputs.trainable_head else 'frozen'}"
    rounds = request.config.getoption("--timed-rounds")
    if peer == "floor":
        benchmark.pedantic(floor, (workload.inputs, workload.loss), rounds=rounds, warmup_rounds=1)
        return
    if why := PEERS[peer].refusal(workload):
        pytest.skip(why)
    contender = PEERS[peer].contender(workload, None)
    errors = whole_truth(workload).errors(contender())
    assert not is_wrong(errors, limits_of(peer, workload.inputs.student_hidden.dtype)), f"wrong: {errors}"
    benchmark.extra_info["value error"] = errors.value
    benchmark.pedantic(contender, rounds=rounds, warmup_rounds=1)
