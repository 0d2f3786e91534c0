"""The case `guidance`: time of guidance_kl, value plus gradients, beside its bare matrix products.

m windows of K positions, K targets each; 3 matrix products over m K rows with a trainable head, 2 with a frozen one.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

import topd
from topd_bench.cases import CASES, make_inputs
from topd_bench.cpu.clock import WallClock
from topd_bench.peers.floor import floor
from topd_bench.records import plain_record
from topd_bench.report import note
from topd_bench.request import Request
from topd_bench.runner import Record
from topd_bench.timing import ratio, times_ms, whole_rounds

HEADER = ("head", "m", "K", "floor time_ms", "topd time_ms", "topd / floor", "note")


def work(request: Request) -> Iterator[Record]:
    """Yield the row of one head."""
    m, window, trainable = request.setting("windows"), request.setting("window"), request.head == "trainable"
    inputs = make_inputs(replace(CASES["smollm2"], n=m * window), trainable_head=trainable)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(inputs.student_weight.shape[0], (m, window), generator=generator)
    plan = torch.rand(m, window, window, generator=generator).softmax(-1) / window
    hidden = inputs.student_hidden.detach().reshape(m, window, -1).requires_grad_()

    def ours() -> object:
        loss = topd.guidance_kl(hidden, topd.Head(inputs.student_weight), tokens, plan, backend=request.backend).mean()
        return torch.autograd.grad(loss, (hidden, inputs.student_weight) if trainable else (hidden,))

    runs = {"floor": lambda: floor(inputs, "logprobs_50"), "ours": ours}
    place = f"guidance, {request.head}"
    samples, complete = whole_rounds(runs, request.rounds, WallClock(), lambda text: note(f"{place}: {text}"))
    if rounds := len(samples["ours"]):
        times = [f"{times_ms(samples[name]).median:.1f}" for name in runs]
        counted = "" if complete else f"interrupted: {rounds} of {request.rounds} rounds"
        cells = [request.head, str(m), str(window), *times, str(ratio(samples["ours"], samples["floor"])), counted]
        yield plain_record("guidance_kl, the shape smollm2, float32", HEADER, cells)
    if not complete:
        raise KeyboardInterrupt
