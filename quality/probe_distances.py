"""The distances between a probe's windows, computed from what its file holds: any part of the windows can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import topd
from quality.probe_points import CLASSES
from quality.probe_windows import AGAIN, ARMS

Array = NDArray[np.float64]
Windows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Points:
    """The points of a probe as columns.

    Attributes:
        label: [n] int, the place of each point's class in CLASSES.
        trajectory: [n] int, from 0 on.
        loss: [n], the teacher's negative log-probability of the token, nats.
        distance: the arms' distances [n, horizons], of the windows' first tokens, as many as a horizon.
        later: the same without the very first, in which windows at high-loss tokens differ by what these are.
        again: the distances of each arm drawn once more, at high-loss tokens alone, [high, horizons].
    """

    label: NDArray[np.int64]
    trajectory: NDArray[np.int64]
    loss: Array
    distance: dict[str, Array]
    later: dict[str, Array]
    again: dict[str, Array]

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], embedding: Tensor, horizons: Sequence[int]) -> "Points":
        """Return the columns of points as a probe's file holds them; embedding [V, d] is the student's input embeddings."""
        _, trajectory = np.unique([record["trajectory"] for record in records], return_inverse=True)
        high = [record for record in records if record["class"] == "high"]

        def table(records: Sequence[dict[str, Any]], names: tuple[str, str], first: int) -> Array:
            student, teacher = ([record["windows"][name] for record in records] for name in names)
            columns = [distances(part(student, first, last), part(teacher, first, last), embedding) for last in horizons]
            return np.stack(columns, axis=1)

        return cls(
            np.array([CLASSES.index(record["class"]) for record in records]),
            trajectory,
            np.array([record["teacher_nll"] for record in records]),
            {arm: table(records, names, 0) for arm, names in ARMS.items()},
            {arm: table(records, names, 1) for arm, names in ARMS.items()},
            {arm: table(high, names, 0) for arm, names in AGAIN.items()},
        )

    def of_class(self, name: str) -> NDArray[np.bool_]:
        """Return which points are of a class."""
        return np.equal(self.label, CLASSES.index(name))


def part(windows: Windows, first: int, last: int) -> Windows:
    """Return the tokens from the place `first` to before `last` of each window; the first token of one that has none there."""
    return [window[first:last] or window[:1] for window in windows]


def distances(student: Windows, teacher: Windows, embedding: Tensor) -> Array:
    """Return the near-future distance between windows, [n], with TOPDConfig's defaults: cosine cost, Sinkhorn.

    Windows that are equal token by token are at distance 0, where the entropy of the plan may leave a little more.
    """
    (ours, lengths), (others, other_lengths) = _padded(student), _padded(teacher)
    transport = topd.near_future_divergence(
        ours, others, embedding.detach(), student_lengths=lengths, teacher_lengths=other_lengths
    )
    equal = torch.tensor([list(one) == list(other) for one, other in zip(student, teacher, strict=True)])
    return np.asarray(transport.distance.masked_fill(equal, 0.0).double().numpy())


def _padded(windows: Windows) -> tuple[Tensor, Tensor]:
    """Return windows as tokens [n, K] and lengths [n]."""
    lengths = [len(window) for window in windows]
    tokens = [[*window, *[0] * (max(lengths) - len(window))] for window in windows]
    return torch.tensor(tokens), torch.tensor(lengths)
