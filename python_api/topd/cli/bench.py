"""`topd bench`: its options. What it does is a package of its own, topd_bench, most of which is imported when it runs."""

import argparse
from pathlib import Path
from typing import Any

from topd.backends import NAMES
from topd.cli.errors import CommandError, require
from topd.cli.options import nonempty, positive
from topd_bench.cases import CASES as SHAPES
from topd_bench.catalogue import CASES, SWEEPS

HELP = "measure topd beside eager torch, torch.compile and the libraries that are installed"
DESCRIPTION = """\
Measures topd on this machine's CPU beside eager torch, torch.compile, TRL,
Liger, ml-cross-entropy, POT and transformers' generate. Whoever is not
installed, does not know a loss, fails or needs too much memory gets a row that
says so. Every result is first held against float64: a wrong one is a row that
says "wrong", not a time. Peers take turns, and a ratio is the median of the
rounds' own ratios, with the smallest and the largest in brackets. Memory is
measured in a fresh process each. (On a GPU: python -m topd_bench.gpu.)

cases, and an estimate of how long they take on two cores:
"""
EPILOG = """\
examples:
  topd bench --case divergence --shape smollm2 --json out.json --plot out.png
  topd bench --case divergence --tokens 1024 --hidden 2048 --vocab 128256
  topd bench --case memory --sweep tokens --plot memory.png
  topd bench --case logprobs --peers ours eager --loss logprobs_1 --rounds 9
  topd bench --case windows --set windows=8 tokens=256
  pip install "topd[bench]"      TRL, Liger and POT, so that they take part"""


def cases() -> str:
    """Return the list of the cases for the help."""
    lines = []
    for name, case in CASES.items():
        needs = f"; needs {case.needs}" if case.needs else ""
        lines.append(f"  {name:<12}{case.measures}\n{'':14}({case.takes}{needs})")
    return "\n".join(lines)


def add_to(commands: Any) -> None:
    """Add the subcommand to those of argparse."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("bench", help=HELP, description=DESCRIPTION + cases(), epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--case", choices=CASES, required=True, help="what is measured")
    shape = parser.add_argument_group("inputs")
    shape.add_argument("--shape", nargs="+", type=nonempty, metavar="NAME", default=[], help="a named shape: " + shapes())
    shape.add_argument("--tokens", nargs="+", type=positive, metavar="N", default=[], help="tokens, in place of the shape's")
    shape.add_argument("--hidden", type=positive, metavar="N", help="hidden width of a shape of your own; needs --vocab")
    shape.add_argument("--teacher-hidden", type=positive, metavar="N", help="the teacher's (default: the student's)")
    shape.add_argument("--vocab", type=positive, metavar="N", help="vocabulary of a shape of your own")
    shape.add_argument("--loss", nargs="+", type=nonempty, metavar="NAME", default=[], help="losses (default: the case's)")
    shape.add_argument("--head", nargs="+", choices=("trainable", "frozen"), default=[], help="of the student (default both)")
    shape.add_argument("--dtype", choices=("float32", "bfloat16"), help="of hidden states and weights (default float32)")
    shape.add_argument("--set", nargs="+", type=setting, metavar="NAME=X", default=[], help="sizes of a case that has its own")
    run = parser.add_argument_group("measurement")
    run.add_argument("--peers", nargs="+", type=nonempty, metavar="NAME", default=["all"], help="all (default), or " + peers())
    run.add_argument("--rounds", type=positive, metavar="N", help="timed rounds (default 5, of a sweep 3)")
    run.add_argument("--malloc", choices=("default", "tuned", "both"), help="glibc's settings, or freed memory kept for reuse")
    run.add_argument("--backend", choices=NAMES, help="topd's backend (default: by device)")
    run.add_argument("--sweep", choices=SWEEPS, help="grow tokens (256 to 16,384) or vocabulary (32,768 to 262,144)")
    run.add_argument("--points", nargs="+", type=positive, metavar="N", default=[], help="other sizes for --sweep")
    run.add_argument("--limit-seconds", type=positive, metavar="S", default=120, help="for a call of a peer (default 120)")
    run.add_argument("--limit-gib", type=positive, metavar="N", help="memory of a job (default: four fifths of what is free)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, anew after each row")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw times or memory there (.png, .svg or .pdf)")
    parser.set_defaults(run=run_bench)


def shapes() -> str:
    """Return the names of the shapes."""
    return ", ".join(f"{name} ({case.n:,} x {case.vocab:,})" for name, case in SHAPES.items())


def peers() -> str:
    """Return the names of all peers."""
    return ", ".join(dict.fromkeys(name for case in CASES.values() for name in case.peers))


def setting(text: str) -> tuple[str, float]:
    """Read NAME=NUMBER."""
    name, equals, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not (name and equals and 0 <= value < 1e9):
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER, such as tokens=256, got {text!r:.60}")
    return name, value


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure; return the exit status."""
    from topd_bench.plans import Options, check
    from topd_bench.plots import check_path, draw
    from topd_bench.session import Session

    options = Options(
        arguments.case,
        shapes=arguments.shape,
        tokens=arguments.tokens,
        hidden=arguments.hidden,
        teacher_hidden=arguments.teacher_hidden,
        vocab=arguments.vocab,
        peers=["ours" if name == "topd" else name for name in arguments.peers],
        heads=arguments.head,
        losses=arguments.loss,
        dtype=arguments.dtype,
        malloc=arguments.malloc,
        rounds=arguments.rounds,
        backend=arguments.backend,
        sweep=arguments.sweep,
        points=arguments.points,
        settings=dict(arguments.set),
        limit_seconds=arguments.limit_seconds,
        limit_gib=arguments.limit_gib,
    )
    if arguments.plot is not None:
        require(("matplotlib",), "--plot", 'pip install "topd[plots]"')
    try:
        check(options)
        check_path(arguments.plot, options.case)
        for option, path in (("--plot", arguments.plot), ("--json", arguments.json)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"{option} must be in a folder that is there, and {path.absolute().parent} is none")
    except ValueError as error:
        raise CommandError(str(error)) from error
    session = Session(options, arguments.json)
    status = session.run()
    if arguments.plot is not None:
        draw(session.fields, options.sweep, arguments.plot)
    return status
