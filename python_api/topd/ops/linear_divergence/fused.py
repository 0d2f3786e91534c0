"""Scores without gradients in one kernel, without tiles of logits; the value is one of them."""

from torch import Tensor

from topd.ops.linear_divergence.spec import Call
from topd.ops.score_tokens.op import run_scores, serves
from topd.ops.shared.plan import ChunkPlan, prefers_fused


def fuses(call: Call, plan: ChunkPlan) -> bool:
    """Tell whether a kernel goes straight from hidden states to scores, the value among them, and is worth it."""
    served = call.backend.fuses_scores and call.spec.score is not None and serves(call.student, call.teacher)
    return served and prefers_fused(plan)


def fused_scores(call: Call, index: slice | Tensor) -> Tensor:
    """Return the scores [9, N'] of the rows at `index`."""
    student, teacher = (side._replace(hidden=side.hidden[index]) for side in (call.student, call.teacher))
    tokens = None if call.tokens is None else call.tokens[index]
    kernel = call.backend.kernel("score_tokens", student.hidden.device)
    return run_scores(kernel, student, teacher, tokens, call.spec)
