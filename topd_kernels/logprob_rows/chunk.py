"""A chunk of logprob_rows: what its launches share, and each launch with its kernel's parameters by name."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from topd_kernels.logprob_rows.kernels import at_ids, chosen, combine, gradient, leave_out, rest
from topd_kernels.shared.launch import Launch, bytes_of, cdiv, logit_numbers


class Blocks(NamedTuple):
    """Entries that a program of the gradient and of `rest` takes at a time, ids that a program takes at a time, the warps of a
    program, and its rows where rows are few numbers each. A program of `rest` has one warp: it often needs a number of all its
    lanes."""

    gradient: int
    rest: int
    ids: int
    gradient_warps: int = 4
    rest_warps: int = 1
    rows: int = 64
    num_warps: int = 4


class Outputs(NamedTuple):
    """logprobs [C, M], entropy [C] or [0], outside [C], first [C, M], slope [C, M] or [0, M], finite [C]."""

    logprobs: Tensor
    entropy: Tensor
    outside: Tensor
    first: Tensor
    slope: Tensor
    finite: Tensor


class Spec(NamedTuple):
    """The numbers of a call, in the order of the op's arguments."""

    scale: float
    softcap: float | None
    temperature: float


@dataclass
class Chunk:
    """What the launches of a chunk share: the tensors, the numbers, the records between the kernels, how it is cut."""

    product: Tensor
    bias: Tensor | None
    ids: Tensor
    spec: Spec
    outputs: Outputs
    chosen_logits: Tensor
    slope: Tensor
    parts: Tensor
    row: Tensor
    grad_scale: float
    blocks: Blocks
    splits: int

    general: bool = field(init=False)  # whether there is a bias or a softcap: the kernels' constant GENERAL
    numbers: dict[str, float] = field(init=False)  # what makes logits of products
    tile: dict[str, Any] = field(init=False)  # the arguments of the kernels that read logits

    def __post_init__(self) -> None:
        inner, outer = logit_numbers(self.spec.scale, self.spec.softcap, self.spec.temperature)
        self.general = self.bias is not None or self.spec.softcap is not None
        self.numbers = {"inner": inner, "outer": outer}
        self.tile = {
            "Product": self.product,
            "stride": self.product.stride(0),
            "Bias": self.product if self.bias is None else self.bias,
            "biased": int(self.bias is not None),
            "vocab": self.product.shape[1],
            **self.numbers,
        }

    def block_count(self, block: int) -> int:
        """Return the blocks of a part of a row."""
        return cdiv(cdiv(self.product.shape[1], block), self.splits)

    @property
    def entry_bytes(self) -> int:
        """Return the bytes that an entry is read from, its bias included."""
        return self.product.itemsize + (0 if self.bias is None else self.bias.itemsize)

    def chosen(self) -> Launch:
        """Return the launch that gathers the ids' logits. Each block of ids is held against all before it."""
        count, block = self.ids.shape[1], self.blocks.ids
        compared = sum(min(start + block, count) for start in range(0, count, block))
        read = (count + compared) * self.ids.itemsize + count * self.entry_bytes
        slopes = count * self.general * self.slope.itemsize
        return Launch(
            chosen,
            (self.ids.shape[0],),
            {
                **self.tile,
                "Ids": self.ids,
                "Chosen": self.chosen_logits,
                "First": self.outputs.first,
                "Slope": self.slope,
                "count": count,
            },
            {"GENERAL": self.general, "BLOCK": block},
            self.blocks.num_warps,
            read_bytes=self.ids.shape[0] * read,
            written_bytes=bytes_of(self.chosen_logits, self.outputs.first) + self.ids.shape[0] * slopes,
        )

    def leave_out(self) -> Launch:
        """Return the launch that takes the ids' entries out of the tile."""
        return Launch(
            leave_out,
            (self.ids.shape[0],),
            {
                "Product": self.product,
                "stride": self.product.stride(0),
                "Ids": self.ids,
                "count": self.ids.shape[1],
                "vocab": self.product.shape[1],
            },
            {"BLOCK": self.blocks.ids},
            self.blocks.num_warps,
            read_bytes=bytes_of(self.ids),
            written_bytes=self.ids.numel() * self.product.itemsize,
        )

    def rest(self, *, entropy: bool) -> Launch:
        """Return the launch that writes the parts."""
        rows, vocab = self.product.shape
        return Launch(
            rest,
            (rows, self.splits),
            {**self.tile, "Parts": self.parts, "rows": rows, "block_count": self.block_count(self.blocks.rest)},
            {"ENTROPY": entropy, "GENERAL": self.general, "BLOCK": self.blocks.rest},
            self.blocks.rest_warps,
            read_bytes=rows * vocab * self.entry_bytes,
            written_bytes=rows * self.splits * (2 + entropy) * self.parts.itemsize,
        )

    def combine(self, *, entropy: bool) -> Launch:
        """Return the launch that writes the outputs and each row's record."""
        rows, count, out = self.product.shape[0], self.ids.shape[1], self.outputs
        parts = rows * self.splits * (2 + entropy) * self.parts.itemsize
        return Launch(
            combine,
            (cdiv(rows, self.blocks.rows),),
            {
                "Parts": self.parts,
                "Chosen": self.chosen_logits,
                "First": out.first,
                "Row": self.row,
                "Logprobs": out.logprobs,
                "Entropy": out.entropy,
                "Outside": out.outside,
                "Finite": out.finite,
                "rows": rows,
                "splits": self.splits,
                "count": count,
            },
            {"ENTROPY": entropy, "BLOCK": self.blocks.rows},
            self.blocks.num_warps,
            read_bytes=parts + 3 * bytes_of(self.chosen_logits) + bytes_of(out.first),
            written_bytes=bytes_of(out.logprobs, out.entropy, out.outside, out.finite)
            + rows * (5 + entropy) * self.row.itemsize,
        )

    def gradient(self, grad_tile: Tensor, entropy_tile: Tensor | None) -> Launch:
        """Return the launch that writes the gradients; without an entropy tile that of the mass outside alone."""
        (rows, vocab), entropy = self.product.shape, entropy_tile is not None
        second = self.product if entropy_tile is None else entropy_tile
        numbers = (5 + entropy) * self.splits
        return Launch(
            gradient,
            (rows, self.splits),
            {
                **self.tile,
                "Row": self.row,
                "Grad": grad_tile,
                "grad_stride": grad_tile.stride(0),
                "EntropyGrad": second,
                "entropy_stride": second.stride(0),
                "rows": rows,
                "block_count": self.block_count(self.blocks.gradient),
                "grad_scale": self.grad_scale,
            },
            {"ENTROPY": entropy, "GENERAL": self.general, "BLOCK": self.blocks.gradient},
            self.blocks.gradient_warps,
            read_bytes=rows * (vocab * self.entry_bytes + numbers * self.row.itemsize),
            written_bytes=rows * vocab * (grad_tile.itemsize + entropy * second.itemsize),
        )

    def at_ids(self, entropy_tile: Tensor) -> Launch:
        """Return the launch that writes the entropy's gradient at the ids."""
        rows, count = self.ids.shape
        numbers = 3 + cdiv(count, self.blocks.ids)
        return Launch(
            at_ids,
            (rows,),
            {
                "Ids": self.ids,
                "Chosen": self.chosen_logits,
                "First": self.outputs.first,
                "Row": self.row,
                "EntropyGrad": entropy_tile,
                "entropy_stride": entropy_tile.stride(0),
                "rows": rows,
                "count": count,
                "vocab": self.product.shape[1],
                **self.numbers,
                "grad_scale": self.grad_scale,
            },
            {"GENERAL": self.general, "BLOCK": self.blocks.ids},
            self.blocks.num_warps,
            read_bytes=bytes_of(self.ids, self.chosen_logits, self.outputs.first) + rows * numbers * self.row.itemsize,
            written_bytes=rows * count * entropy_tile.itemsize,
        )
