"""Readers of an option's words: types for argparse, which turns a refusal into a line and exit status 2."""

import os
from argparse import ArgumentTypeError
from pathlib import Path

DEMO_METHODS = ("opd", "topd")  # one after the other, or one of them
PAIRED_METHODS = ("trd", "opsd", "context")  # one alone; the teacher reads another prompt
SEEDS = 2**32  # a step's seed is a multiple of the run's, and torch takes 64 bits
DIGITS = 12  # no option takes a longer number


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = _whole(text)
    if value is None or value < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text!r:.60}")
    return value


def seed(text: str) -> int:
    """Read a seed."""
    value = _whole(text)
    if value is None or value >= SEEDS:
        raise ArgumentTypeError(f"must be a whole number from 0 to {SEEDS - 1:,}, got {text!r:.60}")
    return value


def _whole(text: str) -> int | None:
    """Read a whole number of at least 0; None where it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= DIGITS else None


def nonempty(text: str) -> str:
    """Refuse a text without a character that shows."""
    if not text.strip():
        raise ArgumentTypeError("must not be empty")
    return text


def folder_name(text: str) -> Path:
    """Read a path that is a folder, or may become one."""
    folder = Path(nonempty(text))
    try:
        standing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        folder.exists()  # raises where the name is too long
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"must name a folder, got {text!r:.60} ({error.args[-1]})") from error
    if not standing.is_dir():
        raise ArgumentTypeError(f"must name a folder, and {standing} is none")
    return folder
