"""OPD and TOPD one after the other from the same start, and what is shown of them."""

from dataclasses import replace
from pathlib import Path

from topd_demo import models, prompts, report
from topd_demo.display import Display
from topd_demo.evaluation import held_out_batch
from topd_demo.loss_cost import measure_loss
from topd_demo.plain import PlainMethod
from topd_demo.settings import Settings
from topd_demo.summary import summarise
from topd_demo.training import Run, Trainer

SAMPLES = 2  # prompts whose answers the terminal shows


class PlainDemo:
    """A run of OPD, TOPD or both."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.texts = prompts.make_prompts(settings.steps * settings.batch, settings.held_out, settings.seed)

    def load(self) -> str:
        """Load the models; return what they are."""
        self.models = models.load(self.settings)
        self.settings = replace(self.settings, left_out=self.models.left_out)
        self.start = {name: value.clone() for name, value in self.models.student.state_dict().items()}
        return self.models.description

    def trainer(self, name: str, folder: Path, runs: list[Run]) -> Trainer:
        """Return a method's trainer, after the runs of others."""
        method = PlainMethod(name, self.models, self.start, self.texts, self.settings)
        return Trainer(method, self.settings, folder, runs[0].before if runs else None)

    def conclude(self, folder: Path, runs: list[Run], finished: bool, display: Display) -> Path:
        """Write the report and show the numbers; return the page's path."""
        batch = held_out_batch(self.models, self.texts.held_out, self.settings) if finished else None
        cost = None if batch is None else measure_loss(self.models, batch)
        page = report.write(folder, runs, cost, self.settings, self.models.description)
        summary = summarise(runs, cost)
        if summary.loss is not None:
            display.table("The loss alone, value and gradients", summary.loss)
        display.table("Where a step's time goes", summary.stages)
        for run in runs:
            if run.pair is not None:
                display.window_pair(run.pair)
        for prompt, answers in summary.samples[:SAMPLES]:
            display.sample("Answers to a held-out prompt", prompt, answers)
        display.table("Reverse KL to the teacher on held-out prompts, nats per token", summary.outcome)
        for line in filter(None, (f"\n{summary.repeats}", *summary.warnings, summary.held)):
            display.say(line)
        return page
