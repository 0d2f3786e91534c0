"""Metrics between two lines of a log."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Shares of a step's loss: they add up over its micro-batches and processes, where the others are averaged. A NaN among them is
# the loss's own and is shown; another metric is NaN where there is nothing to measure, and is left out.
SHARES = ("opd_loss", "guidance_loss")


class RunningMeans:
    """Sums on the metrics' own devices, read only when they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], parts: float = 1) -> None:
        """Add a micro-batch's metrics. `loss` is left out: trainers log their own.

        Args:
            metrics: scalars by name; NaN: nothing to measure, which is no part of the mean.
            parts: of how many parts (micro-batches times processes) the step consists whose shares these are.
        """
        for name, value in metrics.items():
            if name == "loss":
                continue
            count = torch.ones_like(value)
            if name in SHARES:
                value = value * parts
            else:
                absent = value.isnan()
                count, value = count.masked_fill(absent, 0.0), value.masked_fill(absent, 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts[name] + count if name in self._counts else count

    def take(self, across: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the means and start anew; a metric that was NaN each time is left out.

        Args:
            across: an average over processes of one tensor, [2 n], each process's sums and counts.
        """
        sums, counts = self._sums, self._counts
        self._sums, self._counts = {}, {}
        if not sums:
            return {}
        values = torch.stack([value.cpu() for value in (*sums.values(), *counts.values())])
        values = values if across is None else across(values).cpu()
        totals, measured = values.tolist()[: len(sums)], values.tolist()[len(sums) :]
        return {name: total / count for name, total, count in zip(sums, totals, measured, strict=True) if count}
