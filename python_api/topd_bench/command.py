"""What the commands share: their parsers, types of options, and exit statuses."""

import argparse
from pathlib import Path

INTERRUPTED = 130


def positive(text: str) -> int:
    """Read an integer of at least 1; an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser_of(name: str, doc: str | None, counts: dict[str, tuple[int, str]] | None = None) -> argparse.ArgumentParser:
    """Return the parser of `python -m topd_bench.<name>`, described by the first line of its module's docstring.

    Args:
        counts: options that are positive integers: the default and a word on each.
    """
    parser = argparse.ArgumentParser(prog=f"python -m topd_bench.{name}", description=(doc or "").partition("\n")[0])
    for option, (default, text) in (counts or {}).items():
        parser.add_argument(f"--{option}", type=positive, default=default, help=f"{text} (default {default})")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write everything there")
    return parser
