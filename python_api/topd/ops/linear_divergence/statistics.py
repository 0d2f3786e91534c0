"""What the ranks of a sharded head tell each other of a chunk's rows: the tables of both exchanges.

    statistics (this module's `Statistics`)  |  gather  |  sweep (`eager.py`)  |  gather of its sums (`Sums`)  |  gradient

A vocabulary that one process holds goes the same way without the gathers: its statistics and sums are whole already.

`Sums.mean` is E of a gradient p_S (A - E) or A - p_S E. In the first, A is taken relative to A at the student's most likely
entry, which one rank holds. So each rank takes its own relative to c_r, A at its own most likely entry, and with its share of
the student's probability share_r

    E = sum_r (e_r + share_r (c_r - c)),  e_r = sum over its entries of p_S (A - c_r),  c that of the owner.

Bytes of a row and rank in float32: 24 to 40 of the statistics (a token's logit on both sides 8, scores 8), 4 to 28 of the
sums (E and c_r 8, scores 16).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from topd.ops.shared.row_math import Distribution
from topd.ops.shared.shard import Combined, Shard, combined, in_rank_order


class Side(NamedTuple):
    """What is known of one side's rows before the sweep: its softmax over the common vocabulary; the logit of the token [C],
    -inf where it lies elsewhere, or None; the log of the sum of exp over the entries beyond the common vocabulary [C], -inf
    where there are none, or None."""

    common: Distribution
    token: Tensor | None
    beyond: Tensor | None

    def packed(self) -> Tensor:
        """Return what travels [k, C]."""
        common = self.common
        columns = (common.top[..., 0], common.rest[..., 0], common.mode[..., 0].to(common.top.dtype), self.token, self.beyond)
        return torch.stack([column for column in columns if column is not None])


class Statistics(NamedTuple):
    """Both sides; top1_agreement [C] bool; the student's softmax as the ranks hold it, or None."""

    student: Side
    teacher: Side
    agree: Tensor
    parts: Combined | None


def statistics(student: Side, teacher: Side, shard: Shard) -> Statistics:
    """Return what is known of the rows over all ranks; one gather, or none. Each side's `mode` stays that of this rank."""
    if not shard.split:
        return Statistics(student, teacher, (student.common.mode == teacher.common.mode)[..., 0], None)
    mine = student.packed(), teacher.packed()
    everyone = shard.gathered(torch.cat(mine)).split([part.shape[0] for part in mine], dim=1)
    (student, parts, own), (teacher, _, other) = (
        _of_all(side, each) for side, each in zip((student, teacher), everyone, strict=True)
    )
    return Statistics(student, teacher, (own == other).all(0), parts)


def _of_all(side: Side, everyone: Tensor) -> tuple[Side, Combined, Tensor]:
    """Return a side over all ranks from what they sent [R, k, C], its parts, and where its most likely entry is [2, C]: the
    rank, and the column there."""
    tops, rests, modes, *others = everyone.unbind(1)
    parts, dtype = combined(tops, rests), tops.dtype
    columns = iter(others)
    token = None if side.token is None else next(columns).amax(0)
    beyond = None if side.beyond is None else next(columns).logsumexp(0)
    common = side.common._replace(top=parts.top.unsqueeze(-1), rest=parts.rest.unsqueeze(-1))
    place = torch.stack([parts.owner.to(dtype), modes.gather(0, parts.owner.unsqueeze(0))[0]])
    return Side(common, token, beyond), parts, place


class Sums(NamedTuple):
    """A chunk's sums over the vocabulary. `scores`: by name [C]; `mean`: E [C, 1] or None; `reference`: A [C, 1] at this rank's
    most likely entry, where the mean is relative to it, or None."""

    value: Tensor
    scores: dict[str, Tensor]
    mean: Tensor | None
    reference: Tensor | None

    def over(self, shard: Shard, parts: Combined | None) -> "Sums":
        """Return the sums over all ranks, the mean relative to this rank's reference; one gather, or none."""
        if parts is None:
            return self
        columns = [self.value, *self.scores.values()]
        columns += [column[..., 0] for column in (self.mean, self.reference) if column is not None]
        everyone = shard.gathered(torch.stack(columns)).double()
        dtype = self.value.dtype
        value, *others = in_rank_order(everyone).to(dtype).unbind(0)
        scores = dict(zip(self.scores, others, strict=False))
        if self.mean is None:
            return Sums(value, scores, None, None)
        if self.reference is None:
            return Sums(value, scores, others[-1].unsqueeze(-1), None)
        means, references = everyone[:, -2], everyone[:, -1]
        offsets = references - references.gather(0, parts.owner.unsqueeze(0))
        mean = in_rank_order(means + (parts.shares * offsets).masked_fill(parts.shares == 0, 0.0))
        mean = mean - (self.reference[..., 0].double() - references.gather(0, parts.owner.unsqueeze(0))[0])
        return Sums(value, scores, mean.to(dtype).unsqueeze(-1), self.reference)
