"""`topd demo`: its methods one after the other, and the report."""

import argparse
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from topd import files
from topd.cli.errors import INTERRUPTED, require
from topd_demo.run_folder import CHECKPOINTS, CONFIG, check_space, fresh, resumed
from topd_demo.settings import Settings

if TYPE_CHECKING:
    from topd_demo.training import Run, Trainer

METRICS = "metrics.jsonl"
PACKAGES = ("transformers", "rich", "matplotlib", "gguf")
OWN_FILES = (CONFIG, METRICS, "report.html", "curves.png", "windows.png", *CHECKPOINTS)


def run_demo(arguments: argparse.Namespace, missing_extension: str | None) -> int:
    """Run the demo; return the exit status.

    Args:
        arguments: the words of `topd demo`.
        missing_extension: the line that says that the C++ extension is missing, for a run on the CPU; None: it is there.
    """
    require(PACKAGES, "the demo", 'pip install "topd[demo]"')
    folder, settings = (resumed if arguments.resume else fresh)(arguments)
    from topd_demo.display import Display

    display = Display(settings)
    if settings.device == "cpu" and missing_extension:
        display.say(missing_extension)
    finished = _Demo(folder, settings, display).run()
    if not finished:
        display.say(f"Stopped. Go on with: topd demo --resume --out {folder}")
    return 0 if finished else INTERRUPTED


@contextmanager
def stop_after_step(say: Any) -> Iterator[threading.Event]:
    """Let Ctrl-C set the event that this yields; a second one interrupts at once."""
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
    """A run, after its options: models, methods, report."""

    def __init__(self, folder: Path, settings: Settings, display: Any) -> None:
        self.folder, self.settings, self.display = folder, settings, display
        self.runs: list[Run] = []

    def run(self) -> bool:
        """Run it; return False where it was stopped."""
        from topd_demo.figures import NAMES
        from topd_demo.paired_demo import PairedDemo
        from topd_demo.plain_demo import PlainDemo

        settings, display = self.settings, self.display
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(self.folder, OWN_FILES)
        demo = PairedDemo(settings) if settings.paired else PlainDemo(settings)
        display.say(f"Loading the models; {settings.steps} steps of {' and '.join(NAMES[name] for name in settings.methods)}")
        display.say(f"{demo.load()}, on {settings.device}; report in {self.folder}")
        finished = True
        with stop_after_step(display.say) as stopping:
            for name in settings.methods:
                trainer = demo.trainer(name, self.folder, self.runs)
                check_space(self.folder, trainer.checkpoint_bytes())
                if not (self.folder / CONFIG).exists():
                    files.write_json(self.folder / CONFIG, demo.settings.to_json())
                finished = self._train(trainer, stopping)
                if not finished:
                    break
        page = demo.conclude(self.folder, self.runs, finished, display)
        display.say(f"\nThe report: {page}")
        return finished

    def _train(self, trainer: "Trainer", stopping: threading.Event) -> bool:
        """Train by one method, to its end or to where it is stopped, with a checkpoint; return False where it was stopped."""
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
