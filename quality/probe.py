"""Does the near-future distance tell a real divergence from noise: `python -m quality.probe`.

The TOPD paper's section 2.1 (arXiv 2606.00305) on a pair of models that anyone can run: SmolLM2-135M-Instruct teaches itself
without its layers of least influence, found on the fly. The student answers the demo's prompts; at tokens of high loss, at
random ones and at tokens of low loss windows are drawn, and their distance is taken, in each of the ways that
`quality.probe_windows` lists, on the same tokens. An area under the ROC curve of 0.5 says that the distance tells the classes
no better than a coin.

Tables go to stdout, progress to stderr; the folder of --out gets a file of all points and a picture for each student and
temperature. Ctrl-C prints what is there; the same command goes on from it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quality.probe_distances import Points
from quality.probe_file import Pair, fill, read
from quality.probe_plot import scatter
from quality.probe_points import Settings
from quality.probe_report import examples, tables, title
from topd import files
from topd.backends import choose_backend
from topd.cli.errors import INTERRUPTED, CommandError
from topd.cli.options import positive, seed
from topd_bench.machine import cpu_facts
from topd_bench.report import note
from topd_demo import smollm2
from topd_demo.influence import least_influence, without_layers
from topd_demo.prompts import encode, make_prompts

PROMPTS, INFLUENCE_PROMPTS = 512, 16


def temperature(text: str) -> float:
    """Read a number above 0; an argparse type."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def share(text: str) -> float:
    """Read a number in (0, 1]; an argparse type."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    own = Settings(without=2, temperature=1.0)
    described = (__doc__ or "").partition("\n")[0]
    options = argparse.ArgumentParser(prog="python -m quality.probe", description=described)
    options.add_argument("--points", type=positive, default=300, help="points of each class (default 300)")
    options.add_argument("--without", type=positive, nargs="+", default=[2, 4], help="layers that the students lack (2 4)")
    options.add_argument(
        "--temperature", type=temperature, nargs="+", default=[0.7, 1.0], metavar="T", help="of rollouts and windows (0.7 1.0)"
    )
    options.add_argument("--horizon", type=positive, default=own.horizon, help=f"tokens of a window (default {own.horizon})")
    options.add_argument("--tokens", type=positive, default=own.tokens, help=f"tokens of a rollout (default {own.tokens})")
    options.add_argument("--share", type=share, default=own.share, help=f"of high-loss tokens (default {own.share})")
    options.add_argument("--seed", type=seed, default=own.seed, help=f"(default {own.seed})")
    options.add_argument("--show", type=int, default=0, metavar="N", help="also print N high-loss points with their windows")
    options.add_argument("--out", type=Path, default=Path("topd-probe"), metavar="FOLDER", help="(default topd-probe)")
    return options


def load() -> tuple[Any, Any]:
    """Load the teacher and its tokenizer."""
    return smollm2.load_model(), smollm2.load_tokenizer()


def cells(arguments: argparse.Namespace) -> list[Settings]:
    """Return what is asked for, one student after the other."""
    names = ("horizon", "tokens", "share", "seed")
    rest = {name: getattr(arguments, name) for name in names}
    return [Settings(without, each, **rest) for without in arguments.without for each in arguments.temperature]


def run(arguments: argparse.Namespace) -> int:
    """Fill each file, and print its tables; the exit status is 130 after an interrupt."""
    facts: dict[str, Any] = cpu_facts(choose_backend(None, torch.device("cpu")))
    arguments.out.mkdir(parents=True, exist_ok=True)
    teacher, tokenizer = load()
    prompts = make_prompts(PROMPTS, 1, arguments.seed).train
    order = least_influence(teacher, *encode(tokenizer, prompts[:INFLUENCE_PROMPTS], torch.device("cpu")))
    note(f"layers, that of the least influence first: {order}")
    for settings in cells(arguments):
        layers = order[: settings.without]
        pair = Pair(without_layers(teacher, layers), teacher, tokenizer, prompts, layers, facts)
        name = f"without-{settings.without}-temperature-{settings.temperature:g}"
        path = arguments.out / f"{name}.json"
        probe = read(path, settings, layers)
        complete = True

        def progress(text: str, what: str = title(probe)) -> None:
            note(f"{what}: {text}")

        try:
            fill(probe, pair, arguments.points, path, progress)
        except KeyboardInterrupt:
            complete = False
        if probe.points:
            points = Points.of(probe.points, pair.student.get_input_embeddings().weight, settings.horizons)
            print(tables(probe, points) + "\n")
            if arguments.show > 0:
                print(examples(probe, points, tokenizer, arguments.show) + "\n", flush=True)
            with files.whole(arguments.out / f"{name}.png") as unfinished:
                scatter(probe, points).savefig(unfinished, format="png")
        if not complete:
            return INTERRUPTED
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 130 after an interrupt, 1 where something is missing or does not fit."""
    arguments = parser().parse_args(argv)
    if smollm2.missing():
        note(f"quality.probe: {smollm2.missing()}")
        return 1
    try:
        return run(arguments)
    except (ValueError, CommandError) as error:
        note(f"quality.probe: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
