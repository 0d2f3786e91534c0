"""Who watches an objective: told of its calls, of their stages, and of the tensors that part the backward pass.

`topd.profile` watches so. An objective tells one observer, registered on that very instance; nothing is patched.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from torch import Tensor

from topd.objectives.objective import Objective


class Observer:
    """An observer that takes note of nothing; others override what they want to know."""

    def call_begins(self) -> None:
        """Take note that the objective was called."""

    def call_ends(self, objective: Objective | None) -> None:
        """Take note of what a call returns; None where it raised."""

    def stage_begins(self, name: str) -> None:
        """Take note that a stage of a call begins."""

    def stage_ends(self, name: str) -> None:
        """Take note that it ends, also by an error."""

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Take note of a tensor of the student: `student_hidden`, its states over the rollouts; `token_losses`, what each token
        costs; `window_hidden`, its states over the windows. Their gradients are computed in the opposite order."""


NOBODY = Observer()


class Observed(Protocol):
    """What is watched by one observer."""

    @property
    def observer(self) -> Observer: ...


M = TypeVar("M", bound=Observed)
P = ParamSpec("P")
Call = Callable[Concatenate[M, P], Objective]


def observable(call: "Call[M, P]") -> "Call[M, P]":
    """Return a method that tells the objective's observer when it begins and ends."""

    @functools.wraps(call)
    def told(self: M, /, *args: P.args, **options: P.kwargs) -> Objective:
        observer = self.observer  # of the whole call, whatever happens in it
        result = None
        observer.call_begins()
        try:
            result = call(self, *args, **options)
        finally:
            observer.call_ends(result)
        return result

    return told
