"""Metrics between two lines of a log."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Shares of a step's loss: they add up over its micro-batches and processes, where the others are averaged.
SHARES = ("opd_loss", "guidance_loss")


class RunningMeans:
    """Sums on the metrics' own devices, read only when they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, metrics: Mapping[str, Tensor], parts: float = 1) -> None:
        """`loss` is left out: trainers log their own.

        Args:
            parts: of how many parts (micro-batches times processes) the step consists whose shares these are.
        """
        for name, value in metrics.items():
            if name != "loss":
                found = value * parts if name in SHARES else value
                self._sums[name] = self._sums[name] + found if name in self._sums else found
        self._count += 1

    def take(self, across: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means, through `across` (an average over processes) as one tensor; starts anew."""
        sums, count = self._sums, self._count
        self._sums, self._count = {}, 0
        if not sums:
            return {}
        values = torch.stack([value.cpu() for value in sums.values()]) / count
        values = values if across is None else across(values).cpu()
        return dict(zip(sums, values.tolist(), strict=True))
