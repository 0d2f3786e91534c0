"""The lines of `python -m topd_bench.gpu`: what each is about, its contenders, and how their results are judged."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd_bench.agreement import Errors, of_largest, truth_of, whole_truth
from topd_bench.cases import Case, Inputs
from topd_bench.losses import Gradients, Workload
from topd_bench.peers import PEERS, differentiable, ours, scores, transport
from topd_bench.peers.floor import floor, floor_of_scores

TOKENS = 8192
GIB = 1 << 30
SMALL_WORKSPACE = 512 << 20
NOT_INSTALLED = "skipped: not installed"
# What topd may be off by. Values have float32 logits. Of 16-bit gradients dlogits are rounded once, the result once, rows that
# were corrected once more each way; half the spacing of the dtype's numbers at 1 is a rounding.
VALUE_LIMIT, ROUNDINGS, FLOAT32_LIMIT = 1e-3, 4, 1e-5


class Line(NamedTuple):
    """A line of the table.

    runs: the contenders by name; "floor" and "ours" are what the others are divided by.
    flop: of the floor's matrix products, None where it has none.
    errors: judges a contender's result; None for what is no result of the loss, as the floor's.
    limits: what the contenders whose names begin with "ours" are held to.
    skipped: why a contender is not among the runs.
    """

    shape: str
    n: int
    head: str
    loss: str
    runs: Mapping[str, Callable[[], Any]]
    flop: float | None
    errors: Callable[[Any], Errors | None]
    limits: Errors
    skipped: Mapping[str, str]


def gradient_limit(dtype: torch.dtype) -> float:
    return ROUNDINGS * torch.finfo(dtype).eps / 2 + FLOAT32_LIMIT


def needed_bytes(case: Case, itemsize: int) -> int:
    """Return the bytes of the inputs, and the most that the floor or a chunked loss needs beside them: both sides' logits or a
    workspace of 2 GiB and a float32 d weight, and the gradients."""
    student = case.vocab * case.student_width
    states = case.n * (case.student_width + case.teacher_width)
    inputs = itemsize * (states + student + case.vocab * case.teacher_width)
    gradients = itemsize * (student + case.n * case.student_width)
    logits = 2 * case.n * case.vocab * itemsize
    chunked = 2 * GIB + 4 * (student + case.n * case.student_width)
    return inputs + gradients + max(logits, chunked)


def fitted(case: Case, free_bytes: int, itemsize: int) -> tuple[Case, str]:
    """Return the case with tokens halved until it fits in nine tenths of the memory, and what was done."""
    smaller = case
    while smaller.n > 256 and needed_bytes(smaller, itemsize) > 0.9 * free_bytes:
        smaller = replace(smaller, n=smaller.n // 2)
    if smaller.n == case.n:
        return case, ""
    have, need = free_bytes / GIB, needed_bytes(case, itemsize) / GIB
    return (
        smaller,
        f"{case.name}: N reduced from {case.n} to {smaller.n}: {have:.1f} GiB free, N = {case.n} needs {need:.1f} GiB",
    )


def own_line(case: Case, inputs: Inputs, head: str, loss: str) -> Line:
    """Return the line of one loss of one shape, the floor and topd alone, at the default workspace and at a small one."""
    workload = _workload(inputs, head, loss)
    small = Workload.of(replace(inputs, workspace_bytes=SMALL_WORKSPACE), loss)
    runs: dict[str, Callable[[], Any]] = {
        "floor": partial(floor, inputs, loss),
        "ours": ours.PEER.contender(workload, "triton"),
        f"ours, {SMALL_WORKSPACE >> 20} MiB": ours.PEER.contender(small, "triton"),
    }
    return _line(case, workload, head, runs, {})


def loss_line(case: Case, inputs: Inputs, head: str, loss: str, *, compiled: bool) -> Line:
    """Return the line of one loss of one shape, with everyone in it."""
    workload = _workload(inputs, head, loss)
    runs: dict[str, Callable[[], Any]] = {"floor": partial(floor, inputs, loss)}
    names = [name for name in PEERS if compiled or name != "torch.compile"]
    contenders, refusals = differentiable(workload, "triton", names)
    runs |= contenders
    skipped = {} if compiled else {"torch.compile": "skipped: no time left to compile"}
    skipped |= {name: f"skipped: {why}" for name, why in refusals.items()}
    return _line(case, workload, head, runs, skipped)


def _workload(inputs: Inputs, head: str, loss: str) -> Workload:
    inputs.student_weight.requires_grad_(head == "trainable")
    return Workload.of(inputs, loss)


def _line(case: Case, workload: Workload, head: str, runs: Mapping[str, Callable[[], Any]], skipped: Mapping[str, str]) -> Line:
    """Return the line of a loss with these contenders, judged by what is known of it."""
    inputs, loss = workload.inputs, workload.loss
    flop = case.gemm_flop(trainable_head=head == "trainable", teacher=workload.has_teacher)
    truth = whole_truth(workload)

    def errors(result: Any) -> Errors | None:
        return truth.errors(result) if isinstance(result, Gradients) else None

    limit = gradient_limit(inputs.student_hidden.dtype)
    return Line(case.name, case.n, head, loss, runs, float(flop), errors, Errors(VALUE_LIMIT, limit, limit), skipped)


def score_line(case: Case, inputs: Inputs) -> Line:
    """Return the line of score_tokens as it is called, by tiles, beside eager code; without gradients, judged by the
    reverse KL."""
    runs: dict[str, Callable[[], Any]] = {
        "floor": partial(floor_of_scores, inputs),
        "ours": partial(scores.ours, inputs),
        "eager": partial(scores.eager, inputs),
    }
    truth = truth_of(Workload.of(inputs, "reverse_kl"))

    def errors(result: Any) -> Errors | None:
        return Errors(of_largest(result[1, truth.rows], truth.value)) if isinstance(result, Tensor) else None

    flop = 2.0 * case.n * case.vocab * (case.student_width + case.teacher_width)
    return Line(case.name, case.n, "-", "score_tokens", runs, flop, errors, Errors(VALUE_LIMIT), {})


def transport_line(device: torch.device, m: int, window: int, width: int) -> Line:
    """Return the line of topd_bench.transport's contenders on the device, the loop of one problem at a time left out."""
    pairs = transport.Pairs(*(part.to(device) for part in transport.make_pairs(m, window, width)))
    runs: dict[str, Callable[[], Any]] = dict(transport.contenders(pairs, 0.05, 1e-4))
    runs.pop("loop of ot.sinkhorn", None)
    runs = {"ours": runs.pop("topd"), **runs}
    skipped = {} if "ot.batch" in runs else {"ot.batch": NOT_INSTALLED}

    def errors(result: Any) -> Errors:
        return Errors(result.row_error)

    shape = f"{m} x {window} x {window}, d = {width}"
    return Line(shape, m, "-", "transport, largest row error", runs, None, errors, Errors(VALUE_LIMIT), skipped)
