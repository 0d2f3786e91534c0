"""What goes into topd::transport, and what comes out: the table from which its schema and its packing are made."""

from typing import Annotated, NamedTuple, get_args

import torch
from torch import Tensor

from topd.ops.shared.fields import PREFIXED, Table
from topd.options import Cost

COSTS: tuple[str, ...] = get_args(Cost)
# The longest window that the kernels take.
MAX_WINDOW = 128


class WindowSide(NamedTuple):
    """One side of the m pairs: rows of `table` [V, d] at `ids` [m, K], of which the first `lengths` [m] count."""

    table: Tensor
    ids: Tensor
    lengths: Tensor

    @property
    def valid(self) -> Tensor:
        """[m, K] bool, whether a token counts."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths.unsqueeze(-1)

    def vectors(self, pairs: slice) -> Tensor:
        """Return [m', K, d] of the chosen pairs, at least float32; 0 past the lengths."""
        dtype = torch.promote_types(self.table.dtype, torch.float32)
        vectors = self.table[self.ids[pairs].masked_fill(~self.valid[pairs], 0)].to(dtype)
        return vectors.masked_fill(~self.valid[pairs].unsqueeze(-1), 0.0)


class Inputs(NamedTuple):
    """The arguments of topd::transport."""

    student: Annotated[WindowSide, PREFIXED]
    teacher: Annotated[WindowSide, PREFIXED]
    cost: str
    epsilon: float
    max_iterations: int
    tolerance: float

    @property
    def dtype(self) -> torch.dtype:
        """The results' dtype: float32, or float64 where a table is."""
        return torch.promote_types(torch.promote_types(self.student.table.dtype, self.teacher.table.dtype), torch.float32)


class Outputs(NamedTuple):
    """The results: distance [m], plan [m, K_S, K_T], marginal_error [m]."""

    distance: Tensor
    plan: Tensor
    marginal_error: Tensor


INPUTS, OUTPUTS = Table(Inputs, grouped=False), Table(Outputs)
