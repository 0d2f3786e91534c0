"""topd::score_tokens, both sides' scores of each token straight from hidden states and heads: forward only, logits never in
memory.

One pass over both heads, two matrix products in all; the math of `topd_kernels.score_tokens.chain_rule`, the scores those of
`topd.ops.linear_divergence.eager`. Read per token: its hidden states again for each block of the vocabulary (from cache), the
heads once for all the tokens that run together; written: nine floats. A fused kernel registers it for its device.

No public function chooses it: several `tl.dot` in one kernel are known to fault on some GPUs, and no device has judged this one
yet. `topd.score_tokens` goes by tiles (`topd.ops.linear_divergence.op`); `bench.gpu` and the tests call `run_scores`.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from topd.ops.linear_divergence.spec import RowSpec
from topd.ops.shared.fields import PREFIXED, Table
from topd.ops.shared.op_body import define
from topd.ops.shared.tiles import Side
from topd.scores import FIELDS


class PlainSide(NamedTuple):
    """A side without an adapter: hidden [N, H], weight [V, H], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Inputs(NamedTuple):
    """The arguments of topd::score_tokens; tokens [N] int64."""

    student: Annotated[PlainSide, PREFIXED]
    teacher: Annotated[PlainSide, PREFIXED]
    tokens: Tensor | None
    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    temperature: float


INPUTS = Table(Inputs, grouped=False)
define("topd::score_tokens", f"({INPUTS.schema}) -> Tensor")

SERVED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.register_fake("topd::score_tokens")
def _fake(student_hidden: Tensor, *_: Any) -> Tensor:
    return student_hidden.new_empty((len(FIELDS), student_hidden.shape[0]), dtype=torch.float32)


def serves(student: Side, teacher: Side) -> bool:
    """Tell whether the fused kernel takes these operands: no adapter, each side in one dtype of two or four bytes."""
    return all(
        side.a is None
        and side.b is None
        and side.hidden.dtype in SERVED_DTYPES
        and side.weight.dtype == side.hidden.dtype
        and (side.bias is None or side.bias.dtype == side.hidden.dtype)
        for side in (student, teacher)
    )


def run_scores(
    implementation: Callable[..., Tensor], student: Side, teacher: Side, tokens: Tensor | None, spec: RowSpec
) -> Tensor:
    """Return scores [9, N] float32 of operands that `serves` accepts; masked rows are dropped by the caller.

    Args:
        implementation: torch.ops.topd.score_tokens, or `topd_kernels.score_tokens.launches.score_tokens` where CPU tensors go
            to Triton's interpreter.
        student, teacher: hidden [N, H] and heads; the adapter's fields are None.
        tokens: [N] int64; one outside the common vocabulary has log-probability -inf.
        spec: its scales, softcaps and temperature are read.
    """
    first, second = (PlainSide(side.hidden, side.weight, side.bias) for side in (student, teacher))
    numbers = (spec.student_scale, spec.student_softcap, spec.teacher_scale, spec.teacher_softcap, spec.temperature)
    return implementation(*INPUTS.pack(Inputs(first, second, tokens, *numbers)))
