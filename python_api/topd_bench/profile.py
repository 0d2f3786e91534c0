"""The case `profile`: peak memory as `topd profile` predicts it, beside what a fresh process measures.

memory.py says how a peak is measured; the gradients count in both numbers.
"""

from collections.abc import Iterator

import torch

from topd.costs import memory
from topd.costs.call import LossCall
from topd.costs.shapes import ModelShape
from topd.memory import MIB
from topd_bench.catalogue import name_of
from topd_bench.memory import MemoryRow, measured
from topd_bench.records import MEASURED, now_record, plain_record
from topd_bench.request import Request
from topd_bench.runner import Record

WAY_OF = {"eager": "eager", "trl": "TRL", "ours": "topd"}
HEADER = ("peer", "shape", "N", "V", "H", "loss", "head", "predicted, MiB", "measured, MiB", "measured / predicted", "note")


def predicted_mib(request: Request, peer: str) -> float:
    """Return the prediction for a CPU in float32."""
    case = request.sizes
    student, teacher = (ModelShape("", width, case.vocab) for width in (case.student_width, case.teacher_width))
    call = LossCall(student, teacher, case.n, torch.float32, request.loss, request.head == "trainable", None)
    peaks = call.peaks(call.plan(case.workspace_bytes))
    return memory.total(peaks[WAY_OF[peer]]) / MIB


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
