"""topd::logprob_rows for Triton: a tile of products and ids in; log-probabilities, what lies outside the ids and the gradients
out.

Launches of a chunk, S programs a row where rows are few:
    chosen      M logits of a row gathered; which ids are the first of their value
    leave_out   the ids' entries leave the tile
    rest        the tile read once: largest entry and normaliser of what is left, and its entropy
    combine     a row's few numbers, in double
    gradient    the tile read once more and overwritten, the entropy's gradient written beside it
    at_ids      the entropy's gradient at the ids
"""

import torch
from torch import Tensor

from topd_kernels.logprob_rows.chunk import Blocks, Chunk, Outputs, Spec
from topd_kernels.logprob_rows.records import PARTS, ROW
from topd_kernels.shared.blocks import Device, device_of
from topd_kernels.shared.launch import Launch, cdiv, processors, run_all, splits_of_rows

__all__ = ["Blocks", "Outputs", "Spec", "launches", "logprob_rows"]


def blocks_of(device: Device, itemsize: int) -> Blocks:
    """Return block sizes; a small vocabulary or few ids take the same, masked."""
    rest, gradient = (device.sizes(name, itemsize) for name in ("rest", "gradient"))
    return Blocks(gradient.block, rest.block, 64, gradient.num_warps, rest.num_warps)


def launches(
    product: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    spec: Spec,
    entropy_tile: Tensor | None,
    grad_tile: Tensor | None,
    entropy: bool,
    *,
    grad_scale: float = 1.0,
    splits: int | None = None,
    family: str | None = None,
    blocks: Blocks | None = None,
) -> tuple[list[Launch], Outputs]:
    """Return the launches of a chunk, and what they will have written. The gradient of the mass outside the ids goes into
    grad_tile [C, V], of any floating dtype, which may be the tile, the entropy's into entropy_tile; without grad_tile there is
    none. Both are multiplied by grad_scale. `splits` programs share a row, in `blocks`; left out, as many and as large as the
    device needs. `family`: of devices, where it is not the tensors' own."""
    (rows, vocab), count = product.shape, ids.shape[1]
    blocks = blocks or blocks_of(device_of(product.device, family), product.itemsize)
    splits = splits or splits_of_rows(rows, cdiv(vocab, blocks.rest), processors(product))
    new, capped = product.new_empty, spec.softcap is not None
    outputs = Outputs(
        logprobs=new(ids.shape),
        entropy=new(rows if entropy else 0),
        outside=new(rows),
        first=new(ids.shape, dtype=torch.bool),
        slope=new(rows if capped else 0, count),
        finite=new(rows, dtype=torch.bool),
    )
    chunk = Chunk(
        product,
        bias,
        ids.contiguous(),
        spec,
        outputs,
        chosen_logits=new(ids.shape),
        slope=outputs.slope if capped or bias is None else new(ids.shape),  # with a bias alone it is written, and left
        parts=new(PARTS, splits, rows),
        row=new(ROW, rows),
        grad_scale=grad_scale,
        blocks=blocks,
        splits=splits,
    )
    order = [chunk.chosen(), chunk.leave_out()] if count else []
    order += [chunk.rest(entropy=entropy), chunk.combine(entropy=entropy)]
    if grad_tile is not None:
        order.append(chunk.gradient(grad_tile, entropy_tile))
        if entropy_tile is not None and count:
            order.append(chunk.at_ids(entropy_tile))
    return order, outputs


def logprob_rows(
    product: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    entropy_tile: Tensor | None,
    grad: bool,
    entropy: bool,
    grad_tile: Tensor | None = None,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the op `topd::logprob_rows`."""
    tile = (product if grad_tile is None else grad_tile) if grad else None
    second = entropy_tile if grad and entropy else None
    spec = Spec(scale, softcap, temperature)
    order, outputs = launches(product, bias, ids, spec, second, tile, entropy, grad_scale=grad_scale)
    run_all(order)
    return outputs
