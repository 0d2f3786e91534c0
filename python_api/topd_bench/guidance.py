"""Time of guidance_kl, value plus gradients, beside its bare matrix products: `python -m topd_bench.guidance`.

m windows of K positions, K targets each; 3 matrix products over m K rows with a trainable head, 2 with a frozen one.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

import topd
from topd.backends import choose_backend
from topd_bench.cases import CASES, make_inputs
from topd_bench.command import parser_of
from topd_bench.cpu.clock import WallClock
from topd_bench.machine import cpu_facts
from topd_bench.peers.floor import floor
from topd_bench.report import machine_line, markdown_table, note, write_json
from topd_bench.timing import interleave, ratio, times_ms

HEADER = ("head", "m", "K", "floor time_ms", "ours time_ms", "ours/floor")


def measure(m: int, window: int, rounds: int, *, trainable: bool) -> list[str]:
    """Time one line of the table."""
    inputs = make_inputs(replace(CASES["smollm2"], n=m * window), trainable_head=trainable)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(inputs.student_weight.shape[0], (m, window), generator=generator)
    plan = torch.rand(m, window, window, generator=generator).softmax(-1) / window
    hidden = inputs.student_hidden.detach().reshape(m, window, -1).requires_grad_()

    def ours() -> object:
        loss = topd.guidance_kl(hidden, topd.Head(inputs.student_weight), tokens, plan).mean()
        return torch.autograd.grad(loss, (hidden, inputs.student_weight) if trainable else (hidden,))

    runs = {"floor": lambda: floor(inputs, "logprobs_50"), "ours": ours}
    head = "trainable" if trainable else "frozen"
    samples = interleave(runs, rounds, WallClock(), lambda text: note(f"{head}: {text}"))
    times = [f"{times_ms(samples[name]).median:.1f}" for name in runs]
    return [head, str(m), str(window), *times, str(ratio(samples["ours"], samples["floor"]))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    counts = {
        "m": (20, "windows"),
        "window": (50, "positions and targets of a window"),
        "rounds": (5, "timed rounds"),
    }
    arguments = parser_of("guidance", __doc__, counts).parse_args(argv)
    sizes = (arguments.m, arguments.window, arguments.rounds)
    rows = [measure(*sizes, trainable=trainable) for trainable in (True, False)]
    facts = cpu_facts(choose_backend(None, torch.device("cpu")))
    print(f"\n### guidance_kl\n\n{machine_line(facts)}\n")
    print(markdown_table(HEADER, rows))
    if arguments.json is not None:
        write_json(arguments.json, {"benchmark": "guidance", "machine": facts, "header": HEADER, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
