"""What an objective asks of its two models: when it is made, and before each step."""

import warnings
from typing import Any

from torch import nn

from topd.backends import callers_level
from topd.branching.continuations import GENERATE
from topd.branching.windows import Windows
from topd.checks.values import flag
from topd.models.data_parallel import check_synchronised
from topd.models.properties import adds_router_loss, runs_uncompiled, vocabulary_of
from topd.objectives.vocabularies import check_vocabularies


class ModelChecks:
    """The checks of one objective, which remember what they have said.

    Args:
        student, teacher: as the objective got them; no teacher where its answers come in the batch.
        allow_unequal_vocabularies: as of the objective.

    Raises:
        TypeError: not a language model of transformers.
        ValueError: vocabularies that differ by more than padding.
    """

    def __init__(self, student: Any, teacher: Any, allow_unequal_vocabularies: bool) -> None:
        flag("allow_unequal_vocabularies", allow_unequal_vocabularies)
        if teacher is not None:
            check_vocabularies(vocabulary_of(student), vocabulary_of(teacher), allow_unequal_vocabularies)
        self._said: set[str] = set()
        self._looked_around = False

    def before_step(self, student: Any, teacher: Any) -> None:
        """Refuse a student whose gradients nobody would synchronise; warn once of what is probably not meant."""
        self._looked_around |= check_synchronised(student, look_around=not self._looked_around)
        for name, model in (("student", student), ("teacher", teacher)):
            if model is not None and name not in self._said and runs_uncompiled(model):
                self.warn_once(
                    name,
                    f"{name} is compiled as a whole, but topd runs its base model and its output layer apart, which are not "
                    "compiled: compile the base model instead, model.base_model.compile()",
                )
        if teacher is not None and "dropout" not in self._said and has_active_dropout(teacher):
            self.warn_once(
                "dropout",
                "teacher is in train mode with dropout, so that its distributions are drawn anew in every step: call "
                "teacher.eval()",
            )

        if "router" not in self._said and adds_router_loss(student):
            self.warn_once(
                "router",
                "student.config.output_router_logits is True, but the routers' balancing loss is added in the forward of the "
                "whole model, which topd does not call: the loss here is without it. Add it yourself, as "
                "docs/how-to/when-not-to-use-topd.md shows, or set the option to False",
            )

    def of_windows(self, windows: Windows) -> None:
        """Warn of windows that take longer than they need with other models, or with another version of transformers."""
        for name, way in (("student", windows.student_way), ("teacher", windows.teacher_way)):
            if way.startswith(GENERATE):
                self.warn_once(
                    f"{name}'s windows",
                    f"the {name}'s windows come from generate, each with a copy of its prefix, which takes longer than growing "
                    f"them from the rollout's cache: {way.removeprefix(GENERATE)}. `topd doctor` says whether this version of "
                    "transformers is one that topd knows",
                )

    def warn_once(self, key: str, message: str) -> None:
        """Warn, unless this was said before."""
        if key in self._said:
            return
        self._said.add(key)
        warnings.warn(message, UserWarning, stacklevel=callers_level())


def has_active_dropout(model: Any) -> bool:
    """Return whether a module in train mode drops anything: a dropout layer, or a rate that its own forward reads."""
    return any(module.training and _drops(module) for module in model.modules())


def _drops(module: nn.Module) -> bool:
    """Return whether a module drops anything in train mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("dropout" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())
