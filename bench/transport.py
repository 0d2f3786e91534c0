"""Time of Sinkhorn over many window pairs beside POT: `python -m bench.transport`.

m pairs of K x K tokens, embeddings [V, d] as random clusters with a common direction, as those of language models have, half
of a window's tokens shared by the other; cosine cost, plans at epsilon and tolerance as asked. Every contender starts from
token ids and the table and returns distances and plans. topd's tolerance is the largest error of a row or column sum in units
of a marginal, POT's an L2 norm over a problem's rows: "ot.batch" is given the same number, "ot.batch matched" that number
over K, which is what topd's means. Contenders take turns, after an untimed round.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import topd
from bench.measure import Spread, interleave, machine, ratio
from bench.process import INTERRUPTED, positive
from bench.report import machine_line, markdown_table, note, scientific, write_json
from topd.backends import choose_backend

VOCAB = 49152
HEADER = ("contender", "time_ms", "contender/topd", "largest row error, K x", "mean distance")


class Pairs(NamedTuple):
    student: Tensor  # [m, K]
    teacher: Tensor
    embedding: Tensor  # [V, d]


def make_pairs(m: int, window: int, width: int, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(256, width, generator=generator)
    which = torch.randint(256, (VOCAB,), generator=generator)
    embedding = torch.randn(VOCAB, width, generator=generator)
    embedding += centres[which] + 0.7 * torch.randn(1, width, generator=generator)
    student = torch.randint(VOCAB, (m, window), generator=generator)
    other = torch.randint(VOCAB, (m, window), generator=generator)
    shuffled = student[:, torch.randperm(window, generator=generator)]
    teacher = torch.where(torch.rand(m, window, generator=generator) < 0.5, shuffled, other)
    return Pairs(student, teacher, embedding)


class Found(NamedTuple):
    distance: Tensor
    plan: Tensor


def _costs(pairs: Pairs) -> Tensor:
    x, y = (torch.nn.functional.normalize(pairs.embedding[ids], dim=-1) for ids in (pairs.student, pairs.teacher))
    return 1 - x @ y.transpose(1, 2)


def contenders(pairs: Pairs, epsilon: float, tolerance: float) -> dict[str, Callable[[], Found]]:
    import ot

    window = pairs.student.shape[1]

    def ours() -> Found:
        found = topd.near_future_divergence(*pairs, epsilon=epsilon, tolerance=tolerance)
        return Found(found.distance, found.plan)

    def batch(tol: float) -> Found:
        costs = _costs(pairs)
        plan = ot.batch.solve_batch(costs, reg=epsilon, max_iter=20_000, tol=tol, grad="detach").plan
        return Found((plan * costs).sum((1, 2)), plan)

    def loop() -> Found:
        costs = _costs(pairs).double().numpy()
        uniform = [1.0 / window] * window
        plans = [ot.sinkhorn(uniform, uniform, cost, epsilon, numItermax=20_000, stopThr=tolerance) for cost in costs]
        plan = torch.stack([torch.as_tensor(each) for each in plans])
        return Found((plan * torch.from_numpy(costs)).sum((1, 2)), plan)

    return {
        "topd": ours,
        "ot.batch": lambda: batch(tolerance),
        "ot.batch matched": lambda: batch(tolerance / window),
        "loop of ot.sinkhorn": loop,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m bench.transport", description=(__doc__ or "").partition("\n")[0])
    for name, default, text in (
        ("m", 218, "window pairs"),
        ("window", 50, "tokens of a window"),
        ("width", 576, "embedding width"),
        ("rounds", 5, "timed rounds"),
    ):
        found.add_argument(f"--{name}", type=positive, default=default, help=f"{text} (default {default})")
    found.add_argument("--epsilon", type=float, default=0.05)
    found.add_argument("--tolerance", type=float, default=1e-4)
    found.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write everything there")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 after an interrupt."""
    arguments = parser().parse_args(argv)
    pairs = make_pairs(arguments.m, arguments.window, arguments.width)
    runs = contenders(pairs, arguments.epsilon, arguments.tolerance)
    found = {name: run() for name, run in runs.items()}
    try:
        samples = interleave(runs, arguments.rounds, lambda i: note(f"round {i}/{arguments.rounds}" if i else "warm-up"))
    except KeyboardInterrupt:
        return INTERRUPTED
    described = machine(choose_backend(None, torch.device("cpu")), "default")
    window, rows = arguments.window, []
    for name, taken in samples.items():
        error = float((found[name].plan.sum(-1) * window - 1).abs().max())
        against = str(ratio(taken, samples["topd"])) if name != "topd" else "1"
        spread = Spread.of([sample.time_ms for sample in taken])
        rows.append([name, str(spread), against, scientific(error), f"{float(found[name].distance.mean()):.5f}"])
    shape = f"{arguments.m} pairs of {window} x {window}, d = {arguments.width}, cosine, epsilon {arguments.epsilon:g}"
    print(f"\n### transport, {shape}, tolerance {arguments.tolerance:g}\n\n{machine_line(described)}\n")
    print(markdown_table(HEADER, rows), flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {"benchmark": "transport", "machine": described, "header": HEADER, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
