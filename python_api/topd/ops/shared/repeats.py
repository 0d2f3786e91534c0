"""Repeated ids within a row."""

from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """A row's ids sorted, stably: `ordered` and the `order` that sorts; `starts`, where a new id begins; `run`, its number."""

    ordered: Tensor
    order: Tensor
    starts: Tensor
    run: Tensor

    def first(self) -> Tensor:
        """Return [..., M] bool in the ids' own order: not equal to an earlier id of the row."""
        return torch.zeros_like(self.starts).scatter(-1, self.order, self.starts)

    def totals(self, values: Tensor) -> Tensor:
        """Return values [..., M] added up by id, at the id's run number; 0 beyond the runs."""
        return torch.zeros_like(values).scatter_add(-1, self.run, values.gather(-1, self.order))


def runs_of(ids: Tensor) -> Runs:
    ordered, order = ids.sort(dim=-1, stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return Runs(ordered, order, starts, starts.cumsum(-1) - 1)
