"""The case `profile`: peak memory as `topd profile` predicts it, beside what a fresh process measures.

memory.py says how a peak is measured; the gradients count in both numbers.
"""

from collections.abc import Iterator

import torch

from topd.costs import memory
from topd.head import Head
from topd.losses.plan import plan
from topd.ops.shared.plan import MIB
from topd_bench.catalogue import name_of
from topd_bench.memory import MemoryRow, measured
from topd_bench.records import MEASURED, now_record, plain_record
from topd_bench.request import Request
from topd_bench.runner import Record

PEERS = ("eager", "trl", "ours")
HEADER = ("peer", "shape", "N", "V", "H", "loss", "head", "predicted, MiB", "measured, MiB", "measured / predicted", "note")


def predicted_mib(request: Request, peer: str) -> float:
    """Return the prediction for a CPU in float32."""
    case, trained = request.sizes, request.head == "trainable"
    sizes = memory.Sizes(case.n, case.vocab, case.student_width, memory.FLOAT32, trained)
    if peer == "eager":
        parts = memory.eager_memory(sizes, request.loss)
    elif peer == "trl":
        parts = memory.trl_memory(sizes, request.loss, kernels=False)
    else:
        heads = [
            Head(torch.empty(case.vocab, width, device="meta", requires_grad=own))
            for width, own in ((case.student_width, trained), (case.teacher_width, False))
        ]
        chunks = plan(heads[0], heads[1], case.n, device="cpu", workspace_bytes=case.workspace_bytes)
        parts = memory.topd_memory(chunks, sizes)
    return memory.total(parts) / MIB


def work(request: Request) -> Iterator[Record]:
    """Yield the row of one peer."""
    (peer,) = request.peers or ()
    case = request.sizes
    place = [name_of(peer), case.name, f"{case.n}", f"{case.vocab}", f"{case.student_width}", request.loss, request.head]
    yield now_record(peer)
    row = MemoryRow("profile", case, request.dtype, request.head, request.loss, peer)
    row = measured(row, request) if peer not in request.skip else row
    expected = predicted_mib(request, peer)
    numbers = [f"{expected:.0f}", "-", "-"]
    if row.peak_mib is not None:
        numbers = [f"{expected:.0f}", f"{row.peak_mib:.0f}", f"{row.peak_mib / expected:.3f}"]
    failed = peer == "ours" and row.status != MEASURED
    why = request.skip.get(peer, row.note if row.peak_mib is None else "")
    yield plain_record("peak memory, predicted and measured", HEADER, [*place, *numbers, why], failed=failed)
