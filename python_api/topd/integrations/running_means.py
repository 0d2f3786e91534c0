"""Metrics between two lines of a log."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Shares of a step's loss: they add up over its micro-batches and processes, where the others are averaged.
SHARES = ("opd_loss", "guidance_loss")


class RunningMeans:
    """Sums and counts on the metrics' own devices, read only when they are taken. A NaN says that there was nothing to measure:
    it is left out of the mean."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], parts: float = 1) -> None:
        """`loss` is left out: trainers log their own.

        Args:
            parts: of how many parts (micro-batches times processes) the step consists whose shares these are.
        """
        for name, value in metrics.items():
            if name != "loss":
                share = value * parts if name in SHARES else value
                counted = torch.stack([share.nan_to_num(0.0, torch.inf, -torch.inf), (~share.isnan()).to(share.dtype)])
                self._sums[name] = self._sums[name] + counted if name in self._sums else counted

    def take(self, across: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means of what was measured, through `across` (an average over processes) as one tensor; starts anew."""
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        values = torch.stack([value.cpu() for value in sums.values()])
        values = values if across is None else across(values).cpu()
        means = values[:, 0] / values[:, 1]
        return {name: mean for name, mean in zip(sums, means.tolist(), strict=True) if mean == mean}
