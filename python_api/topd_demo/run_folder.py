"""Choose a run's folder and settings, from the command's options or from a run that was stopped."""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from topd.cli.errors import CommandError
from topd.cli.options import DEMO_METHODS, PAIRED_METHODS
from topd.memory import MIB
from topd_demo.settings import OF_METHODS, QUICK, Settings

DEFAULT_FOLDER, CONFIG = "topd-demo", "config.json"
CHECKPOINTS = tuple(f"checkpoint-{name}.pt" for name in (*DEMO_METHODS, *PAIRED_METHODS))
SPARE_BYTES = 50 * MIB


def fresh(arguments: argparse.Namespace) -> tuple[Path, Settings]:
    """Return the folder and the settings of a new run; config.json is not written yet.

    Raises:
        CommandError: the folder holds a run, or an option does not fit.
    """
    if arguments.method == "opsd" and arguments.teacher is not None:
        raise CommandError(
            "--teacher is not for --method opsd, whose student is its own teacher: name the model with --student"
        )
    values: dict[str, Any] = OF_METHODS.get(arguments.method, {}) | (QUICK if arguments.quick else {})
    given = {"steps", "batch", "tokens", "seed", "teacher", "student"}
    values |= {name: value for name, value in vars(arguments).items() if name in given and value is not None}
    if arguments.method is not None:
        values["methods"] = (arguments.method,)
    folder = arguments.out
    if folder is None:
        places = (Path(f"{DEFAULT_FOLDER}{suffix}") for suffix in ("", *(f"-{i}" for i in range(2, 10_000))))
        folder = next(place for place in places if _of_a_run(place) is None and (place.is_dir() or not place.exists()))
    elif (path := _of_a_run(folder)) == folder / CONFIG:
        raise CommandError(f"{folder} holds a run already: go on with it by --resume, or take another folder with --out")
    elif path is not None:
        raise CommandError(f"{path} is of a run whose {CONFIG} is missing: remove it, or take another folder with --out")
    return folder, Settings(**values, device=_device(arguments.device))


def _of_a_run(folder: Path) -> Path | None:
    """Return the first file in the folder that a run goes on from."""
    return next((folder / name for name in (CONFIG, *CHECKPOINTS) if (folder / name).exists()), None)


def _device(name: str | None) -> str:
    """Check that torch has the device, and return its name; None: the GPU where there is one."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)
    if match is None:
        raise CommandError(f"--device must be cpu or cuda (or cuda:0, cuda:1, ...), got {name!r:.60}")
    if name == "cpu":
        return name
    if not torch.cuda.is_available():
        raise CommandError(f"--device {name}: torch finds no CUDA device here; leave the option out to run on the CPU")
    if int(match[1] or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices here, the first is cuda:0")
    return name


def resumed(arguments: argparse.Namespace) -> tuple[Path, Settings]:
    """Return the folder and the settings of a run that was stopped.

    Raises:
        CommandError: there is none, or an option was given that it has already.
    """
    fixed = ("quick", "steps", "method", "batch", "tokens", "seed", "teacher", "student", "device")
    given = {name: getattr(arguments, name) for name in fixed}
    if extra := [f"--{name}" for name, value in given.items() if value is not None and value is not False]:
        raise CommandError(f"--resume goes on with the run's own options, got {', '.join(extra)} too: leave them out")
    folder = arguments.out
    if folder is None:
        places = sorted(Path().glob(f"{DEFAULT_FOLDER}*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
        if not places:
            raise CommandError("there is no run to go on with here: start one with `topd demo`, or name its folder with --out")
        folder = places[-1].parent
    try:
        settings = Settings.from_json(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CommandError(f"{folder} holds no run (no {CONFIG}): start one with `topd demo --out {folder}`") from error
    except (ValueError, RecursionError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise CommandError(
            f"{folder / CONFIG} cannot be read ({reason}): start a new run in another folder with --out"
        ) from error
    try:
        _device(settings.device)
    except CommandError as error:
        raise CommandError(
            f"{folder / CONFIG} asks for {settings.device}, which is not here: start a new run with --out"
        ) from error
    return folder, settings


def check_space(folder: Path, checkpoint_bytes: int) -> None:
    """Check that there is room for a checkpoint and for the one that replaces it.

    Raises:
        CommandError: there is not enough.
    """
    free, needed = shutil.disk_usage(folder).free, 2 * checkpoint_bytes + SPARE_BYTES
    if free < needed:
        have, want = (f"{size / MIB:,.0f} MiB" for size in (free, needed))
        raise CommandError(
            f"not enough disk space in {folder}: {have} free, checkpoints need {want}; take another place with --out"
        )
