"""A method whose teacher reads another prompt, from the models to what is shown of it."""

from pathlib import Path

from topd_demo import models, paired_report
from topd_demo.context import ContextDistillation
from topd_demo.display import Display
from topd_demo.paired import PairedMethod
from topd_demo.paired_words import WORDS
from topd_demo.settings import Settings
from topd_demo.solving import Refinement, SelfDistillation
from topd_demo.summary import stages
from topd_demo.training import Run, Trainer

METHODS: dict[str, type[ContextDistillation] | type[Refinement] | type[SelfDistillation]] = {
    method.name: method for method in (ContextDistillation, Refinement, SelfDistillation)
}


class PairedDemo:
    """A run of one such method."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def load(self) -> str:
        """Load the models; return what they are."""
        name = self.settings.methods[0]
        loaded = (models.load_with_lora if name == "opsd" else models.load)(self.settings)
        self.method: PairedMethod = METHODS[name](loaded, self.settings)
        self.description = loaded.description
        return self.description

    def trainer(self, _name: str, folder: Path, _runs: list[Run]) -> Trainer:
        """Return the method's trainer."""
        return Trainer(self.method, self.settings, folder)

    def conclude(self, folder: Path, runs: list[Run], _finished: bool, display: Display) -> Path:
        """Write the report and show the numbers; return the page's path."""
        (run,) = runs
        page = paired_report.write(folder, run, self.settings, self.description)
        words = WORDS[run.method]
        display.table(f"{words.heading}, on held-out questions", paired_report.outcome(run))
        display.say(paired_report.collapsed(run))
        display.table("Where a step's time goes", stages(runs))
        place = paired_report.shown(run.before, run.after)[0]
        old, new = run.before.rows[place], run.after.rows[place]
        answers = {"before": old.student, "after": new.student, words.teacher: new.teacher}
        display.sample("A held-out question", new.question, answers)
        return page
