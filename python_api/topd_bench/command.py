"""What the commands share: a type of options, and an exit status."""

import argparse

INTERRUPTED = 130


def positive(text: str) -> int:
    """Read an integer of at least 1; an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
