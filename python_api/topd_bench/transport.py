"""Time of Sinkhorn over many window pairs beside POT: `python -m topd_bench.transport`.

m pairs of K x K tokens, embeddings [V, d], cosine cost, plans at epsilon and tolerance as asked (`peers/transport.py` has the
contenders, and what each means by the tolerance). Contenders take turns, after an untimed round.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from topd.backends import choose_backend
from topd_bench.command import INTERRUPTED, parser_of
from topd_bench.cpu.clock import WallClock
from topd_bench.machine import cpu_facts
from topd_bench.peers.transport import contenders, make_pairs
from topd_bench.report import machine_line, markdown_table, note, scientific, write_json
from topd_bench.timing import interleave, ratio, times_ms

HEADER = ("contender", "time_ms", "contender/topd", "largest row error, K x", "mean distance")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    counts = {
        "m": (218, "window pairs"),
        "window": (50, "tokens of a window"),
        "width": (576, "embedding width"),
        "rounds": (5, "timed rounds"),
    }
    parser = parser_of("transport", __doc__, counts)
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 after an interrupt."""
    arguments = parser().parse_args(argv)
    pairs = make_pairs(arguments.m, arguments.window, arguments.width)
    runs = contenders(pairs, arguments.epsilon, arguments.tolerance)
    if len(runs) == 1:
        note("POT is not installed: topd alone")
    solutions = {name: run() for name, run in runs.items()}
    try:
        samples = interleave(runs, arguments.rounds, WallClock(), note)
    except KeyboardInterrupt:
        return INTERRUPTED
    facts = cpu_facts(choose_backend(None, torch.device("cpu")))
    rows = []
    for name, each in samples.items():
        against = str(ratio(each, samples["topd"])) if name != "topd" else "1"
        error, distance = scientific(solutions[name].row_error), float(solutions[name].distance.mean())
        rows.append([name, str(times_ms(each)), against, error, f"{distance:.5f}"])
    windows = f"{arguments.m} pairs of {arguments.window} x {arguments.window}, d = {arguments.width}"
    shape = f"{windows}, cosine, epsilon {arguments.epsilon:g}"
    print(f"\n### transport, {shape}, tolerance {arguments.tolerance:g}\n\n{machine_line(facts)}\n")
    print(markdown_table(HEADER, rows), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {"benchmark": "transport", "machine": facts, "header": HEADER, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
