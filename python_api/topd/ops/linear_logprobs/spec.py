"""What goes into topd::linear_logprobs, topd::linear_logprobs_backward and topd::logprob_rows, and what comes out: the tables
from which their schemas, their packing and their unpacking are made."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from topd.ops.shared.engines import Engine
from topd.ops.shared.fields import PREFIXED, WRITTEN, Table
from topd.ops.shared.float16_scale import scale_within
from topd.ops.shared.shard import WHOLE, Shard
from topd.ops.shared.tiles import HeadGrads, Needs, Side

HEAD_VOCABULARY = "the rows of head.weight"
SHARDED_VOCABULARY = "the tokens that all ranks of the sharded head hold"

# What an entry of both gradients reaches for a slope of 1: that of the mass outside the ids 1; the entropy's p |log p| + p H,
# below 1 + log V.
LARGEST = 20.0


class LogprobSpec(NamedTuple):
    """The numbers that turn a matrix product into logits."""

    scale: float
    softcap: float | None
    temperature: float

    def grad_scale(self, dtype: torch.dtype) -> float:
        """Return the power of two by which tiles of this dtype with gradients to the product are multiplied."""
        return scale_within(dtype, abs(self.scale / self.temperature) * LARGEST)


class LogprobRows(NamedTuple):
    """Per row: logprobs [C, M], entropy [C] (or [0]), outside [C], all in the product's dtype; first [C, M], whether an id is
    its row's first of that value; slope [C, M], d z / d product at the ids (or [0, M], where it is the same everywhere);
    finite [C]; outside_grad and entropy_grad [C, V] to the raw product, or None."""

    logprobs: Tensor
    entropy: Tensor
    outside: Tensor
    first: Tensor
    slope: Tensor
    finite: Tensor
    outside_grad: Tensor | None
    entropy_grad: Tensor | None


class RowsInputs(NamedTuple):
    """The arguments of topd::logprob_rows. The product [C, V] float32 or float64 is overwritten: where `grad` asks for it, it
    holds the gradient of the mass outside the ids afterwards, unless `grad_tile` [C, V] of any floating dtype does; with
    `entropy` too the entropy's gradient goes into `entropy_tile` [C, V]. What is there is `grad_scale` times the gradients.
    The bias [V] has the product's dtype; ids [C, M] are int64."""

    product: Annotated[Tensor, WRITTEN]
    bias: Tensor | None
    ids: Tensor
    spec: LogprobSpec
    entropy_tile: Annotated[Tensor | None, WRITTEN]
    grad: bool
    entropy: bool
    grad_tile: Annotated[Tensor | None, WRITTEN] = None
    grad_scale: float = 1.0


class RowsOutputs(NamedTuple):
    """The results of topd::logprob_rows, as `LogprobRows` has them."""

    logprobs: Tensor
    entropy: Tensor
    outside: Tensor
    first: Tensor
    slope: Tensor
    finite: Tensor


class Call(NamedTuple):
    """What the public function, forward and backward share. hidden [N, H], mask [N] bool, ids [N, M] int64. `padded`: an id of
    -1 stands for no token. `dense`: forward sums the head's gradients under the hint; without it they wait for backward.
    `numbers`: what `topd.ops.shared.numbers` packed, or None. `shard`: which tokens the head holds here; where other ranks hold
    further ones, `tokens` is how many there are in all."""

    side: Side
    mask: Tensor | None
    ids: Tensor
    spec: LogprobSpec
    workspace_bytes: int | None
    backend: Engine
    padded: bool
    dense: bool
    numbers: Tensor | None = None
    shard: Shard = WHOLE
    tokens: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The tile's dtype, and the result's."""
        return torch.promote_types(self.side.hidden.dtype, torch.float32)

    @property
    def vocab(self) -> int:
        """The width of the head's vocabulary, of the part of it that is here."""
        return self.side.weight.shape[0]

    def in_range(self, ids: Tensor) -> Tensor:
        """Tell which ids are tokens, here or on other ranks."""
        return (ids >= 0) & (ids < (self.tokens if self.shard.split else self.vocab))

    @property
    def grad_dtype(self) -> torch.dtype:
        """The dtype of gradients to the product: 16 bits have a tile of their own."""
        weight = self.side.weight
        return self.backend.grad_dtype(weight.dtype, self.dtype, weight.device)


class Inputs(NamedTuple):
    """The arguments of topd::linear_logprobs. `keep`: whether forward may keep a tile of gradients where rows are few."""

    call: Call
    weights_hint: Tensor | None
    needs: Annotated[Needs, PREFIXED]
    keep: bool
    entropy: bool


class Kept(NamedTuple):
    """What forward leaves for backward beside the log-probabilities and the mass outside: u and u_entropy [N, H], the gradients
    of the mass outside and the entropy to the hidden states; the head's sums of the first under `hint` [N]; or, of few rows,
    outside_grad [N, V]; first and slope [N, M] as in `LogprobRows`; of a sharded head of_ids [N, H + r], what
    `topd.ops.linear_logprobs.ids` says. Empty what is not needed."""

    u: Tensor
    grads: Annotated[HeadGrads, PREFIXED]
    u_entropy: Tensor
    first: Tensor
    slope: Tensor
    hint: Tensor
    outside_grad: Tensor
    of_ids: Tensor


class Outputs(NamedTuple):
    """The results of topd::linear_logprobs: log-probabilities [N, M], the entropy [N] or [0], the log of the mass outside the
    ids [N]."""

    logprobs: Tensor
    entropy: Tensor
    outside: Tensor
    kept: Kept


class Upstreams(NamedTuple):
    """The first arguments of topd::linear_logprobs_backward: the gradients that come in, None where none does: [N, M], [N],
    [N]."""

    logprobs: Tensor | None
    entropy: Tensor | None
    outside: Tensor | None


class Saved(NamedTuple):
    """The arguments of topd::linear_logprobs_backward behind the upstream gradients; `uniform_hint`: no hint was given."""

    call: Call
    logprobs: Tensor
    outside: Tensor
    kept: Kept
    needs: Annotated[Needs, PREFIXED]
    uniform_hint: bool


class Gradients(NamedTuple):
    """The results of topd::linear_logprobs_backward, empty where not needed."""

    hidden: Tensor
    grads: Annotated[HeadGrads, PREFIXED]


ROWS_INPUTS, ROWS_OUTPUTS = Table(RowsInputs, grouped=False), Table(RowsOutputs)
UPSTREAMS = Table(Upstreams, prefix="grad_")
CALL, INPUTS, OUTPUTS, SAVED, GRADIENTS = Table(Call), Table(Inputs), Table(Outputs), Table(Saved), Table(Gradients)
