"""How a command ends when it cannot go on: one line that says what is wrong and what to do."""

import errno
import importlib.util
from collections.abc import Iterable

import torch

INTERRUPTED = 130  # the exit status after Ctrl-C
PIPE_CLOSED = 141  # where nobody reads the output any more
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CommandError(Exception):
    """An error whose text is the line that the command ends with."""


def require(packages: Iterable[str], purpose: str, remedy: str) -> None:
    """Check that every package can be found, by the name it is imported by.

    Raises:
        CommandError: one of them cannot.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise CommandError(
            f"{', '.join(missing)} {verb} not installed, and {purpose} needs {'it' if verb == 'is' else 'them'}: {remedy}"
        )


def explained(error: BaseException) -> str | None:
    """Return the line for an error that is not the code's fault; None for any other."""
    if isinstance(error, CommandError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "CUDA out of memory: take fewer rollouts a step (--batch), shorter ones (--tokens), or --device cpu"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        place = f" at {error.filename}" if error.filename else ""
        return f"no space left on the disk{place}: free some, or write elsewhere with --out; a run goes on with --resume"
    if isinstance(error, ModuleNotFoundError):
        return f'{error.name} is not installed: pip install "topd[demo]"'
    if isinstance(error, PermissionError):
        return f"{error.filename} may not be written: take another folder with --out"
    return None
