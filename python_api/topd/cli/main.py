"""The `topd` command: parse the arguments, run a subcommand, print an error in one line."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import topd
from topd.backends import missing_extension
from topd.cli import bench, demo, doctor, profile, refine
from topd.cli.errors import INTERRUPTED, PIPE_CLOSED, explained

DESCRIPTION = """\
topd distils language models on-policy: a student learns from its own text,
token by token, under a teacher's distributions. This command shows it at work
and looks after an installation; the library is `import topd`."""
EPILOG = "`topd COMMAND --help` explains a command and its options."


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` explains the options\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    words = _Parser(prog="topd", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--version", action="version", version=f"topd {topd.__version__}")
    commands = words.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    bench.add_to(commands)
    demo.add_to(commands)
    doctor.add_to(commands)
    profile.add_to(commands)
    refine.add_to(commands)
    for each in commands.choices.values():
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 for a failure, 2 for wrong words, 130 after Ctrl-C, 141 where its output is closed."""
    arguments = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            if line := missing_extension():  # each command says it in its own place
                warnings.filterwarnings("ignore", re.escape(line))
            status: int = arguments.run(arguments)
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"topd {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads the output, as head does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        if arguments.debug:
            raise
        line = explained(error) or f"{_first_line(error)} (an error of topd's own? --debug shows the traceback)"
        print(f"topd {arguments.command}: {line}", file=sys.stderr)
        return 1


def _first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")


if __name__ == "__main__":
    sys.exit(main())
