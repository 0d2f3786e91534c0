"""topd::divergence_rows for Triton: two tiles of products in; divergences, scores and the gradient to the student's product
out.

Launches of a chunk, S programs a row where rows are few:
    statistics  both tiles read once: largest entries, normalisers, and the reverse KL's centre E, each online
    constants   S parts of a row to its numbers
    sweep       both tiles read once: value, scores and, for the forward and the reverse KL, the gradient
    sweep       both tiles once more, for the gradient of the divergences whose E is known only after the first
    finish      S parts of a row's sums to its value and scores
"""

import torch
from torch import Tensor

from topd_kernels.divergence_rows.chunk import Blocks, Chunk, Outputs, Spec
from topd_kernels.divergence_rows.records import PARTS, ROW, SUMS
from topd_kernels.divergence_rows.terms import (
    CLIPPED_KL,
    EVEN_JSD,
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    SKEW_KL,
    SKEW_REVERSE_KL,
    TOTAL_VARIATION,
)
from topd_kernels.shared.blocks import Device, device_of
from topd_kernels.shared.launch import Launch, cdiv, processors, run_all, splits_of_rows
from topd_kernels.shared.records import SCORES

__all__ = ["Blocks", "Outputs", "Spec", "divergence_rows", "launches"]

MAX_VOCAB = 1 << 24  # an index is kept in a float32
KINDS = {
    "forward_kl": FORWARD_KL,
    "reverse_kl": REVERSE_KL,
    "jsd": JSD,
    "skew_kl": SKEW_KL,
    "skew_reverse_kl": SKEW_REVERSE_KL,
    "total_variation": TOTAL_VARIATION,
}


def kind_of(divergence: str, parameter: float, itemsize: int) -> int:
    """Return the kernels' number of a divergence over tiles of entries of so many bytes. A forward KL with an entry clip is a
    kind of its own, and so is the JSD at beta = 1/2 in float32."""
    if divergence not in KINDS:
        raise ValueError(f"unknown divergence {divergence!r}")
    kind = KINDS[divergence]
    if divergence == "forward_kl" and parameter != float("inf"):
        kind = CLIPPED_KL
    elif divergence == "jsd" and parameter == 0.5 and itemsize == 4:
        kind = EVEN_JSD
    return int(kind.value)


def is_heavy(kind: int, scores: bool, itemsize: int) -> bool:
    """Tell whether a sweep of a kind keeps more in registers: with scores, or a mixture's in float64."""
    return scores or (kind > REVERSE_KL.value and itemsize == 8)


def blocks_of(device: Device, itemsize: int, *, heavy: bool) -> Blocks:
    """Return block sizes; `heavy`: of a sweep that keeps more in registers. A small vocabulary takes the same, masked."""
    statistics, sweep = (device.sizes(name, itemsize, heavy=heavy and name == "sweep") for name in ("statistics", "sweep"))
    return Blocks(statistics.block, sweep.block, statistics.num_warps, sweep.num_warps)


def launches(
    student_product: Tensor,
    teacher_product: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    spec: Spec,
    grad_tile: Tensor | None,
    scores: bool,
    *,
    grad_scale: float = 1.0,
    splits: int | None = None,
    family: str | None = None,
    blocks: Blocks | None = None,
) -> tuple[list[Launch], Outputs]:
    """Return the launches of a chunk, and what they will have written. The gradient times grad_scale goes into grad_tile
    [C, V_s], of any floating dtype, which may be the student's tile; without it there is none. `splits` programs share a row,
    in `blocks`; left out, as many and as large as the device needs. `family`: of devices, where it is not the tensors' own."""
    rows, vocab = student_product.shape[0], min(student_product.shape[1], teacher_product.shape[1])
    if vocab >= MAX_VOCAB:
        raise ValueError(f"the common vocabulary must be below {MAX_VOCAB}, got {vocab}")
    itemsize = student_product.itemsize
    kind = kind_of(spec.divergence, spec.parameter, itemsize)
    heavy = is_heavy(kind, scores, itemsize)
    blocks = blocks or blocks_of(device_of(student_product.device, family), itemsize, heavy=heavy)
    splits = splits or splits_of_rows(rows, cdiv(vocab, blocks.statistics), processors(student_product))
    new = student_product.new_empty
    outputs = Outputs(new(rows), new(SCORES.value if scores else 0, rows), new(rows, dtype=torch.bool))
    chunk = Chunk(
        student_product,
        teacher_product,
        student_bias,
        teacher_bias,
        None if tokens is None else tokens.contiguous(),
        spec,
        scores,
        outputs,
        parts=new(PARTS, splits, rows),
        row=new(ROW, rows),
        sums=new(SUMS, splits, rows),
        kind=kind,
        vocab=vocab,
        blocks=blocks,
        splits=splits,
    )
    first = [chunk.statistics(centre=kind == REVERSE_KL.value and grad_tile is not None), chunk.constants()]
    if grad_tile is None or kind in (FORWARD_KL.value, REVERSE_KL.value):
        sweeps = [chunk.sweep(grad_tile, grad_scale, value=True)]
    else:
        sweeps = [chunk.sweep(None, grad_scale, value=True), chunk.sweep(grad_tile, grad_scale, value=False)]
    return [*first, *sweeps, chunk.finish()], outputs


def divergence_rows(
    student_product: Tensor,
    teacher_product: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    student_scale: float,
    student_softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    temperature: float,
    divergence: str,
    parameter: float,
    hard_weight: float,
    grad: bool,
    scores: bool,
    grad_tile: Tensor | None = None,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op `topd::divergence_rows`."""
    spec = Spec(student_scale, student_softcap, teacher_scale, teacher_softcap, temperature, divergence, parameter, hard_weight)
    operands = (student_product, teacher_product, student_bias, teacher_bias, tokens)
    tile = (student_product if grad_tile is None else grad_tile) if grad else None
    order, outputs = launches(*operands, spec, tile, scores, grad_scale=grad_scale)
    run_all(order)
    return outputs
