"""`topd demo`: the two methods one after the other, and the report."""

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
