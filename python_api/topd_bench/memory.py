"""The case `memory`: peak resident memory of value plus gradients, beyond inputs and gradients. Linux only.

Each number comes from a fresh process, which
1. imports everything, then warms up threads, the matrix-product library and autograd on tiny shapes;
2. makes the inputs in place, so that every page of them is resident and no temporary was ever as large;
3. gives the heap's free pages back (malloc_trim) and resets the kernel's high-water mark (/proc/self/clear_refs);
4. reads VmRSS, the baseline: interpreter, libraries, inputs;
5. computes value and gradients once and, with the gradients still alive, reads VmHWM.

peak_mib is VmHWM - baseline, gradients included; beyond_mib is what is left without the bytes of the returned gradients
and may not pass the budget: one fp32 d weight (trainable head) + one fp32 d hidden + the workspace + 64 MiB. What the
matrix-product library keeps for large shapes is not warmed up, so it counts; a peer that compiles (torch.compile, Liger's
divergences) is called once before step 3, so that its compiler does not count. Allocator settings are glibc's defaults: blocks
above 32 MiB, which are all that matters at 1,024 tokens and more, are mapped one by one and unmapped when freed.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from topd.ops.shared.plan import MIB, default_workspace
from topd_bench.cases import CASES, Case, Inputs, make_inputs
from topd_bench.catalogue import name_of
from topd_bench.cpu.high_water import high_water_mib, settle
from topd_bench.limits import first_call, limit_memory
from topd_bench.losses import Workload, has_teacher
from topd_bench.peers import PEERS
from topd_bench.records import FAILED, MEASURED, SKIPPED, now_record, row_record
from topd_bench.report import note
from topd_bench.request import DTYPES, Request
from topd_bench.runner import Record

SLACK_MIB = 64
HEADER = ("peer", "head", "N", "V", "loss", "peak_mib", "gradients_mib", "beyond_mib", "budget_mib", "note")


@dataclass(frozen=True)
class MemoryRow:
    """One measurement; budget_mib holds for ours and is None for the others. What was not measured is None, `note` says why."""

    case: str
    shape: Case
    dtype: str
    head: str
    loss: str
    peer: str
    status: str = SKIPPED
    note: str = ""
    baseline_mib: float | None = None
    peak_mib: float | None = None
    gradients_mib: float | None = None
    beyond_mib: float | None = None
    budget_mib: float | None = None

    def cells(self) -> list[str]:
        """Return its cells under HEADER."""
        sizes = (self.peak_mib, self.gradients_mib, self.beyond_mib, self.budget_mib)
        numbers = ["-" if size is None else f"{size:.0f}" for size in sizes]
        return [name_of(self.peer), self.head, str(self.shape.n), str(self.shape.vocab), self.loss, *numbers, self.note]

    def record(self) -> Record:
        """Return the line that a job sends; it is a failure where topd passed its budget or was not measured."""
        shape = self.shape
        heading = f"{self.case}, {shape.name}: H {shape.student_width:,} (teacher {shape.teacher_width:,}), {self.dtype}"
        failed = self.peer == "ours" and (self.status == FAILED or self.note.startswith("over"))
        return row_record(heading, HEADER, self.cells(), asdict(self), failed=failed)


def budget_mib(inputs: Inputs) -> float:
    """Return what topd may use beyond inputs and gradients."""
    gradients = sum(tensor.numel() for tensor in inputs.differentiated) * 4
    workspace = inputs.workspace_bytes or default_workspace("cpu")
    return (gradients + workspace) / MIB + SLACK_MIB


def work(request: Request) -> Iterator[Record]:
    """Yield the row of one peer."""
    (peer,) = request.peers or ()
    row = MemoryRow("memory", request.sizes, request.dtype, request.head, request.loss, peer)
    yield now_record(peer)
    yield (replace(row, note=request.skip[peer]) if peer in request.skip else measured(row, request)).record()


def measured(row: MemoryRow, request: Request) -> MemoryRow:
    """Measure once in this process, which should be fresh."""
    peer, trainable, dtype = PEERS[row.peer], request.head == "trainable", DTYPES[request.dtype]
    warm_up = Workload.of(make_inputs(CASES["tiny"], trainable_head=trainable, dtype=dtype), request.loss)
    if why := peer.refusal(warm_up):
        return replace(row, note=why)
    note(f"{request.place()}: {row.peer}")
    limit_gib = limit_memory(request.limit_gib)
    if why := first_call(peer.contender(warm_up, request.backend), limit_gib).why:
        return replace(row, status=FAILED, note=why)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    inputs = make_inputs(request.sizes, trainable_head=trainable, dtype=dtype)
    contender = peer.contender(Workload.of(inputs, request.loss), request.backend)
    if compiles(row.peer, request.loss):
        first_call(contender, limit_gib)
    baseline_mib = settle()
    call = first_call(contender, limit_gib)
    if call.why:
        return replace(row, status=FAILED, note=call.why)
    peak_mib = high_water_mib() - baseline_mib
    gradients_mib = sum(grad.nbytes for grad in (call.result.hidden, call.result.weight) if grad is not None) / MIB
    beyond_mib, budget = peak_mib - gradients_mib, budget_mib(inputs) if row.peer == "ours" else None
    return replace(
        row,
        status=MEASURED,
        note="over its budget" if budget is not None and beyond_mib > budget else "",
        baseline_mib=baseline_mib,
        peak_mib=peak_mib,
        gradients_mib=gradients_mib,
        beyond_mib=beyond_mib,
        budget_mib=budget,
    )


def compiles(peer: str, loss: str) -> bool:
    """Tell whether a peer compiles at its first call."""
    return peer == "torch.compile" or (peer == "liger" and has_teacher(loss))
