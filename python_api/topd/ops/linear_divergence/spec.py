"""What goes into topd::linear_divergence, topd::linear_divergence_backward and topd::divergence_rows, and what comes out: the
tables from which their schemas, their packing and their unpacking are made."""

import math
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from topd.ops.shared.engines import Engine
from topd.ops.shared.fields import PREFIXED, WRITTEN, Table
from topd.ops.shared.float16_scale import scale_within
from topd.ops.shared.shard import WHOLE, Shard
from topd.ops.shared.tiles import HeadGrads, Needs, Side

COMMON_VOCABULARY = "the vocabulary that both heads share"


class Traits(NamedTuple):
    """What the loop must know of a divergence.

    Attributes:
        jumps: whether the gradient to the logits jumps, as the total variation's where p_S = p_T.
        largest: what an entry of the gradient to the logits reaches for an upstream gradient and a slope of 1. That of a
            KL from the student's side may be as large as its row's value: float16 is scaled for 250, and larger ones are
            held there.
    """

    jumps: bool = False
    largest: float = 2.0


TRAITS = {
    "forward_kl": Traits(),
    "reverse_kl": Traits(largest=250.0),
    "jsd": Traits(),
    "skew_kl": Traits(),
    "skew_reverse_kl": Traits(largest=250.0),
    "total_variation": Traits(jumps=True),
}


class RowSpec(NamedTuple):
    """The numbers that turn two matrix products into divergences."""

    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    temperature: float
    divergence: str
    parameter: float
    hard_weight: float

    def with_numbers(self, temperature: float, parameter: float, hard_weight: float) -> "RowSpec":
        """Return the same with other values of what may change from call to call."""
        return self._replace(temperature=temperature, parameter=parameter, hard_weight=hard_weight)

    @property
    def clips(self) -> bool:
        """Whether it is a forward KL with an entry clip."""
        return self.divergence == "forward_kl" and self.parameter < math.inf

    @property
    def jumps(self) -> bool:
        """Whether the gradient to the logits jumps; the entry clip's does where an entry reaches the clip."""
        return self.clips or TRAITS[self.divergence].jumps

    def grad_scale(self, dtype: torch.dtype) -> float:
        """Return the power of two by which a tile of this dtype with gradients to the student's product is multiplied."""
        slope = self.student_scale / self.temperature
        return scale_within(dtype, abs(slope) * (TRAITS[self.divergence].largest + abs(self.hard_weight)))


class Rows(NamedTuple):
    """Per row: value [C], scores [9, C] (or empty), finite [C] bool; grad_logits [C, V_s] to the raw product, or None."""

    value: Tensor
    scores: Tensor
    finite: Tensor
    grad_logits: Tensor | None


class RowsInputs(NamedTuple):
    """The arguments of topd::divergence_rows. Tiles of matrix products [C, V_s] and [C, V_t] float32 or float64 are
    overwritten: where `grad` asks for it the student's holds the gradient to it afterwards, unless `grad_tile` [C, V_s] of any
    floating dtype does; what is there is `grad_scale` times the gradient. Biases [V_s], [V_t] have the tiles' dtype; tokens [C]
    are int64."""

    student_product: Annotated[Tensor, WRITTEN]
    teacher_product: Annotated[Tensor, WRITTEN]
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    tokens: Tensor | None
    spec: RowSpec
    grad: bool
    scores: bool
    grad_tile: Annotated[Tensor | None, WRITTEN] = None
    grad_scale: float = 1.0


class RowsOutputs(NamedTuple):
    """The results of topd::divergence_rows: value [C], scores [9, C] or [0, C], finite [C] bool."""

    value: Tensor
    scores: Tensor
    finite: Tensor


class Call(NamedTuple):
    """What the public function, forward and backward share. hidden [N, H], mask [N] bool, tokens [N] int64; `numbers`: what
    `topd.ops.shared.numbers` packed, or None; `shard`: of which part of the vocabulary both sides' heads hold the rows."""

    student: Annotated[Side, PREFIXED]
    teacher: Annotated[Side, PREFIXED]
    mask: Tensor | None
    tokens: Tensor | None
    spec: RowSpec
    workspace_bytes: int | None
    backend: Engine
    numbers: Tensor | None = None
    shard: Shard = WHOLE

    @property
    def dtype(self) -> torch.dtype:
        """The tiles' dtype, and the result's."""
        hidden = torch.promote_types(self.student.hidden.dtype, self.teacher.hidden.dtype)
        return torch.promote_types(hidden, torch.float32)

    @property
    def vocab(self) -> int:
        """The width of the common vocabulary, of the part of it that is here."""
        return min(self.student.weight.shape[0], self.teacher.weight.shape[0])


class Inputs(NamedTuple):
    """The arguments of topd::linear_divergence. `keep`: whether forward may keep dlogits where rows are few."""

    call: Call
    weights_hint: Tensor | None
    needs: Annotated[Needs, PREFIXED]
    keep: bool
    scores: bool


class Kept(NamedTuple):
    """What forward leaves for backward: u [N, H], the gradients to the hidden states for an upstream gradient of 1; the head's
    gradients summed under `hint` [N]; or, of few rows, dlogits [N, V]. Empty what is not needed."""

    u: Tensor
    grads: Annotated[HeadGrads, PREFIXED]
    hint: Tensor
    dlogits: Tensor


class Outputs(NamedTuple):
    """The results of topd::linear_divergence: value [N], scores [9, N] or [0, N]."""

    value: Tensor
    scores: Tensor
    kept: Kept


class Saved(NamedTuple):
    """The arguments of topd::linear_divergence_backward behind the upstream gradient; `uniform_hint`: no hint was given."""

    call: Call
    kept: Kept
    needs: Annotated[Needs, PREFIXED]
    uniform_hint: bool


class Gradients(NamedTuple):
    """The results of topd::linear_divergence_backward, empty where not needed."""

    hidden: Tensor
    grads: Annotated[HeadGrads, PREFIXED]


ROWS_INPUTS, ROWS_OUTPUTS = Table(RowsInputs, grouped=False), Table(RowsOutputs)
CALL, INPUTS, OUTPUTS, SAVED, GRADIENTS = Table(Call), Table(Inputs), Table(Outputs), Table(Saved), Table(Gradients)
