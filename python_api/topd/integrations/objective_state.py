"""What a trainer does for an objective that keeps something between steps (topd.OPSD): tell it of them, save it, load it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from topd import files
from topd.objectives.method import Method

FILE = "objective.pt"


class FollowSteps(transformers.TrainerCallback):  # type: ignore[misc]
    """Call `after_step` where the optimizer took a step, and save the objective's state with each checkpoint.

    Args:
        trainer: a transformers.Trainer.
        objective_of: returns the trainer's objective of now; None before there is one.
    """

    def __init__(self, trainer: Any, objective_of: Callable[[], Method | None]) -> None:
        self._trainer, self._objective_of = trainer, objective_of

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Tell the objective, unless the step was skipped since float16 gradients overflowed."""
        objective = self._objective_of()
        if objective is not None and not self._trainer.accelerator.optimizer_step_was_skipped:
            objective.after_step()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the state beside the files of the checkpoint that Trainer has just written."""
        objective = self._objective_of()
        if objective is not None and args.should_save:
            save_objective(objective, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def save_objective(objective: Method, folder: Path) -> None:
    """Save an objective's state in a checkpoint, all of it or nothing; an objective without one writes no file."""
    state = objective.state_dict()
    if state:
        files.save(folder / FILE, state, torch.save)


def load_objective(objective: Method, folder: Path) -> None:
    """Let an objective go on from a checkpoint.

    Raises:
        ValueError: the checkpoint has no such state and the objective needs one, or is another objective's.
    """
    file = folder / FILE
    if file.exists():
        objective.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    elif objective.state_dict():
        raise ValueError(
            f"a checkpoint to resume {type(objective).__name__} from must hold {FILE}, got none in {folder}; it was written by "
            "another objective, or the run ended while it was written: take an earlier one"
        )


def load_resumed(objective: Method | None, trainer: Any, resume_from_checkpoint: str | bool | None) -> None:
    """Load the objective's state from the checkpoint that `trainer.train` is about to resume; the first thing that it does."""
    checkpoint = resume_from_checkpoint
    if checkpoint is True:
        checkpoint = get_last_checkpoint(trainer.args.output_dir)  # None: Trainer says so
    if objective is not None and checkpoint:
        load_objective(objective, Path(str(checkpoint)))
