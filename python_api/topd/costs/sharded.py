"""What a rank holds, multiplies and exchanges where heads are sharded over the vocabulary: a prediction, nothing runs it."""

from dataclasses import replace
from typing import Any

from topd.costs import memory
from topd.costs.call import LossCall

# Of a row, what a rank tells the others: top and rest of both sides, the gap at the local mode, the sum of weighted gaps, both
# modes, both logits of the token: ten float32 numbers.
RECORD_BYTES = 40
SECOND_GATHER = {"jsd": "the JSD needs a second, smaller gather, which is not counted"}


def rank_share(call: LossCall, ranks: int) -> dict[str, Any]:
    """Return what one of so many ranks needs for the loss.

    Args:
        call: of the whole vocabulary.
        ranks: among which the vocabulary is shared as equally as can be; the largest share is returned.
    """
    sides = [side._replace(vocab=-(-side.vocab // ranks)) for side in (call.student, call.teacher)]
    local = replace(call, student=sides[0], teacher=sides[1])
    chunks, itemsize = local.plan(), call.dtype.itemsize
    others = ranks - 1
    return {
        "ranks": ranks,
        "vocab": local.vocab,
        "student_weight_bytes": itemsize * sides[0].hidden * sides[0].vocab,
        "teacher_weight_bytes": itemsize * sides[1].hidden * sides[1].vocab,
        "tile_bytes": chunks.workspace_bytes,
        "rows": chunks.rows,
        "chunks": chunks.chunks,
        "grad_weight_bytes": memory.FLOAT32 * sides[0].hidden * sides[0].vocab * call.trained,
        "grad_hidden_bytes": memory.FLOAT32 * sides[0].hidden * call.n,
        "peak_bytes": chunks.peak_bytes,
        "flop": chunks.flop,
        "time": local.time(chunks),
        "statistics_bytes_a_row": RECORD_BYTES * others,
        "grad_hidden_bytes_a_row": 2 * others * memory.FLOAT32 * sides[0].hidden // ranks,
        "note": SECOND_GATHER.get(call.loss, ""),
    }
