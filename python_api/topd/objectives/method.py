"""What every method has beside its loss: a place in a training loop, and a state in its checkpoints."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from topd.models.inside import inside, shards
from topd.objectives.objective import Objective
from topd.objectives.observers import NOBODY, Observer

M = TypeVar("M", bound="Method")
P = ParamSpec("P")
Call = Callable[Concatenate[M, Any, P], Objective]


class Method:
    """An objective that keeps nothing between steps; one that does says so itself.

    Attributes:
        student, teacher: its models.
        observer: who is told of this objective's calls.
    """

    student: Any
    teacher: Any
    observer: Observer = NOBODY

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Tell an observer of the calls of this objective meanwhile; afterwards nobody, also after an error.

        Raises:
            ValueError: another one is told already.
        """
        if self.observer is not NOBODY:
            raise ValueError(
                f"objective must not be observed twice at a time, and this {type(self).__name__} is already inside a "
                "topd.profile block; leave that block first"
            )
        self.observer = observer
        try:
            yield
        finally:
            self.observer = NOBODY

    def after_step(self) -> None:
        """Take note of an optimizer step: call it after each step that the optimizer took. Trainers of topd do so."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold beside the student, the optimizer and so on: tensors by name; here none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: of an objective of the same method and configuration.

        Raises:
            TypeError, ValueError: another objective's state.
        """
        check_state(state, set())


def with_whole_teacher(call: "Call[M, P]") -> "Call[M, P]":
    """Return a method (batch, ...) that runs inside the forward of what shards the objective's teacher, where something does.

    There its layers and its head are whole, and whole again in the backward pass, which may need the head once more.
    """

    @functools.wraps(call)
    def run(self: M, batch: Any, *args: P.args, **options: P.kwargs) -> Objective:
        if self.teacher is self.student or not shards(self.teacher):
            return call(self, batch, *args, **options)
        return inside(self.teacher, lambda given: call(self, given, *args, **options), batch)

    return run  # type: ignore[return-value]


def check_state(state: object, expected: Any) -> None:
    """Check that a state holds tensors by these names and nothing else."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of tensors, got {type(state).__name__}")
    wrong = sorted(set(state) ^ set(expected), key=str)
    if wrong:
        came = "without" if wrong[0] in expected else "with"
        raise ValueError(
            f"state must be that of an objective of the same method and configuration, got one {came} {wrong[0]!r}; take the "
            "configuration with which the checkpoint was written"
        )
