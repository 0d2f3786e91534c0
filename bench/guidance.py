"""Time of guidance_kl, value plus gradients, beside its bare matrix products: `python -m bench.guidance`.

m windows of K positions, K targets each; 3 matrix products over m K rows with a trainable head, 2 with a frozen one.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

import topd
from bench.cases import CASES, make_inputs
from bench.measure import Spread, interleave, machine, ratio
from bench.peers import floor
from bench.process import positive
from bench.report import machine_line, markdown_table, note
from topd.backends import choose_backend

HEADER = ("head", "m", "K", "floor time_ms", "ours time_ms", "ours/floor")


def measure(m: int, window: int, rounds: int, *, trainable: bool) -> list[str]:
    """One line of the table."""
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
    samples = interleave(runs, rounds, lambda i: note(f"{head}: {f'round {i}/{rounds}' if i else 'warm-up'}"))
    times = [f"{Spread.of([s.time_ms for s in samples[name]]).median:.1f}" for name in runs]
    return [head, str(m), str(window), *times, str(ratio(samples["ours"], samples["floor"]))]


def main(argv: Sequence[str] | None = None) -> int:
    found = argparse.ArgumentParser(prog="python -m bench.guidance", description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--m", type=positive, default=20, help="windows (default 20)")
    found.add_argument("--window", type=positive, default=50, help="positions and targets of a window (default 50)")
    found.add_argument("--rounds", type=positive, default=5, help="timed rounds (default 5)")
    arguments = found.parse_args(argv)
    sizes = (arguments.m, arguments.window, arguments.rounds)
    rows = [measure(*sizes, trainable=trainable) for trainable in (True, False)]
    print(f"\n### guidance_kl\n\n{machine_line(machine(choose_backend(None, torch.device('cpu')), 'default'))}\n")
    print(markdown_table(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
