"""The peers, a file each: topd ("ours"), eager torch, the same under torch.compile, TRL, Liger, ml-cross-entropy; the floor of
bare products; and those of other cases, scores.py and transport.py (POT).

Libraries are imported when they are first called.
"""

from collections.abc import Iterable

from topd.options import BackendName
from topd_bench.losses import Workload
from topd_bench.peers import cce, eager, liger, ours, torch_compile, trl
from topd_bench.peers.peer import Differentiable, Peer

PEERS: dict[str, Peer] = {
    "ours": ours.PEER,
    "eager": eager.PEER,
    "torch.compile": torch_compile.PEER,
    "trl": trl.PEER,
    "liger": liger.PEER,
    "cce": cce.PEER,
}


def differentiable(
    workload: Workload, backend: BackendName | None, names: Iterable[str] = tuple(PEERS)
) -> tuple[dict[str, Differentiable], dict[str, str]]:
    """Return the peers that compute a workload, by name, and why the others do not.

    Args:
        backend: topd's; None is the device's default.
    """
    contenders, refusals = {}, {}
    for name in names:
        if why := PEERS[name].refusal(workload):
            refusals[name] = why
        else:
            contenders[name] = PEERS[name].contender(workload, backend)
    return contenders, refusals
