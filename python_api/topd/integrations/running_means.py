"""Metrics between two lines of a log."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from topd.objectives.diagnostics import DIAGNOSTICS, Totals

# Shares of a step's loss: they add up over its micro-batches and processes, where the others are averaged. A NaN among them is
# the loss's own and is shown; another metric is NaN where there is nothing to measure, and is left out.
SHARES = ("opd_loss", "guidance_loss")


class RunningMeans:
    """Sums on the metrics' own devices, read only when they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], parts: float = 1, counted: bool = True) -> None:
        """Add a micro-batch's metrics. `loss` is left out, which trainers log themselves, and so are the diagnostics, which are
        no means of micro-batches: `RunningTotals`.

        Args:
            metrics: scalars by name; NaN: nothing to measure, which is no part of the mean.
            parts: of how many parts (micro-batches times processes) the step consists whose shares these are.
            counted: False: their names alone count, which are then the same in all processes.
        """
        for name, value in metrics.items():
            if name == "loss" or name in DIAGNOSTICS:
                continue
            count = torch.ones_like(value)
            if name in SHARES:
                value = value * parts
            else:
                absent = value.isnan()
                count, value = count.masked_fill(absent, 0.0), value.masked_fill(absent, 0.0)
            if not counted:
                count, value = torch.zeros_like(count), torch.zeros_like(value)
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


class RunningTotals:
    """Diagnostics between two lines of a log: sums over tokens, divided only when they are taken."""

    def __init__(self) -> None:
        self._totals: Totals | None = None

    def add(self, totals: Totals) -> None:
        """Add a micro-batch's totals."""
        self._totals = totals if self._totals is None else self._totals.plus(totals)

    def take(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the diagnostics and start anew; what was not measured is left out.

        Args:
            gather: makes [P, n] of one tensor [1, n] of each of P processes.
        """
        totals, self._totals = self._totals, None
        if totals is None:
            return {}
        if gather is not None:
            totals = Totals.of_processes(gather(totals.flat().unsqueeze(0)))
        values = totals.metrics()
        numbers = torch.stack(list(values.values())).tolist()
        return {name: number for name, number in zip(values, numbers, strict=True) if not math.isnan(number)}
