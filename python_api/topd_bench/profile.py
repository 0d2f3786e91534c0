"""Peak memory as `topd profile` predicts it, beside what a fresh process measures: `python -m topd_bench.profile`.

`python -m topd_bench.memory` says how a peak is measured; the gradients count in both numbers.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from topd.costs import memory
from topd.head import Head
from topd.losses.plan import plan
from topd.ops.shared.plan import MIB
from topd_bench.cases import CASES
from topd_bench.command import INTERRUPTED, parser_of
from topd_bench.cpu.process import options, run_worker
from topd_bench.losses import DIVERGENCES
from topd_bench.memory import HEADS
from topd_bench.report import machine_line, markdown_table, note, write_json

PEERS = ("eager", "trl", "ours")
# Case and tokens.
SHAPES = (("smollm2", 1024), ("smollm2", 2048), ("qwen", 512))
HEADER = ("peer", "case", "N", "V", "H", "loss", "head", "predicted, MiB", "measured, MiB", "measured / predicted")


class Asked(NamedTuple):
    """A measurement."""

    peer: str
    case: str
    n: int
    loss: str = "reverse_kl"
    head: str = "trainable"


def predicted_mib(asked: Asked) -> float:
    """Return the prediction for a CPU in float32."""
    case, trained = CASES[asked.case], asked.head == "trainable"
    sizes = memory.Sizes(asked.n, case.vocab, case.student_width, memory.FLOAT32, trained)
    if asked.peer == "eager":
        parts = memory.eager_memory(sizes, asked.loss)
    elif asked.peer == "trl":
        parts = memory.trl_memory(sizes, asked.loss, kernels=False)
    else:
        heads = [
            Head(torch.empty(case.vocab, width, device="meta", requires_grad=own))
            for width, own in ((case.student_width, trained), (case.teacher_width, False))
        ]
        chunks = plan(heads[0], heads[1], asked.n, device="cpu", workspace_bytes=case.workspace_bytes)
        parts = memory.topd_memory(chunks, sizes)
    return memory.total(parts) / MIB


def measured(asked: Asked) -> tuple[float, dict[str, Any]] | None:
    """Return the measured MiB, and the facts of the machine; None where the worker failed or was interrupted."""
    outcome = run_worker("topd_bench.memory", options(asked._asdict()))
    if outcome.status or outcome.report is None:
        return None
    return outcome.report["row"]["peak_mib"], outcome.report["machine"]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    words = parser_of("profile", __doc__)
    words.add_argument("--loss", nargs="+", choices=DIVERGENCES, default=["reverse_kl"])
    words.add_argument("--head", choices=HEADS, default="trainable")
    words.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS))
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 where nothing was measured, 1 where a worker failed."""
    words = parser().parse_args(argv)
    rows: list[dict[str, Any]] = []
    cells: list[list[str]] = []
    machine, status = None, 0
    for asked in (Asked(peer, *shape, loss, words.head) for shape in SHAPES for loss in words.loss for peer in words.peer):
        note(" ".join(map(str, asked)))
        if (result := measured(asked)) is None:
            status = 1
            continue
        mib, machine = result
        expected = predicted_mib(asked)
        rows.append(asked._asdict() | {"predicted_mib": expected, "measured_mib": mib})
        case = CASES[asked.case]
        sizes = (f"{asked.n}", f"{case.vocab}", f"{case.student_width}")
        numbers = (f"{expected:.0f}", f"{mib:.0f}", f"{mib / expected:.3f}")
        cells.append([asked.peer, asked.case, *sizes, asked.loss, asked.head, *numbers])
    if machine is None:
        return status or INTERRUPTED
    print(machine_line(machine) + "\n")
    print(markdown_table(HEADER, cells))
    if words.json is not None:
        write_json(words.json, {"benchmark": "profile", "machine": machine, "rows": rows})
    return status


if __name__ == "__main__":
    sys.exit(main())
