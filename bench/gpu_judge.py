"""What a check of `python -m bench.gpu` holds, and how it is judged: the largest error of a part over its largest true entry
against the error that is allowed there.

Bounds, u = half the spacing of the dtype's numbers at 1:
    float32         no worse than eager torch in float32 on the same inputs, plus 5e-6: logits of magnitude 40 are themselves
                    known to 40 * 6e-8 = 2.4e-6, and a GPU's exp adds as much once more
    16 bits         values as above, since logits are float32; gradients + 4 u: dlogits are rounded once, the result
                    once, rows that were corrected once more each way
    sums in order   (terms + 2) eps over the sum of the terms' magnitudes, the classical bound
    transport       both sides stop within the tolerance of the marginals: 10 tolerance, of the largest distance; sums of
                    the float32 plan 1e-5 of a marginal
    near equal      relative error of a KL of 1e-7: 3e-4, where the usual formula has no digit left
    again           0: bit for bit
    variants        as many binaries after ten numbers of rows as after the first
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOAT32_CONSTANT = 5e-6
NARROW_ROUNDINGS = 4
HEADER = ("check", "worst part", "error", "bound", "ok")


class Part(NamedTuple):
    """One result beside its truth; `bound` is in units of `scale`, the largest true entry where it is None."""

    found: Tensor
    truth: Tensor
    bound: float
    scale: float | None = None

    @property
    def error(self) -> float:
        """NaN where a result is NaN and the truth is not, inf where shapes differ."""
        if self.found.shape != self.truth.shape:
            return torch.inf
        if not self.truth.numel():
            return 0.0
        found, truth = self.found.double(), self.truth.double()
        gap = torch.where(found == truth, 0.0, (found - truth).abs()).max()
        scale = float(truth.abs().max()) if self.scale is None else self.scale
        return float(gap) / scale if scale > 0 else (0.0 if float(gap) == 0 else torch.inf)


class Evidence(NamedTuple):
    """What a check found, part by part."""

    name: str
    parts: dict[str, Part]


@dataclass(frozen=True)
class Check:
    """A judged check: the part that is furthest beyond, or nearest to, what is allowed."""

    name: str
    part: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # NaN is not

    def cells(self) -> list[str]:
        """Its cells under HEADER."""
        return [self.name, self.part, f"{self.error:.1e}", f"{self.bound:.1e}", "yes" if self.ok else "NO"]

    def row(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity."""
        finite = {key: str(value) if value in (torch.inf,) or value != value else value for key, value in asdict(self).items()}
        return {**finite, "ok": self.ok}


def judge(evidence: Evidence) -> Check:
    """The worst part."""

    def excess(part: Part) -> float:
        error = part.error
        if error != error:
            return torch.inf
        return error / part.bound if part.bound > 0 else (torch.inf if error > 0 else 0.0)

    name, worst = max(evidence.parts.items(), key=lambda item: excess(item[1]))
    return Check(evidence.name, name, worst.error, worst.bound)


def no_worse(
    found: Mapping[str, Tensor], yardstick: Mapping[str, Tensor], truth: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Part]:
    """Parts bounded by eager torch's float32 errors and the constants above; gradients are those named "d ..."."""
    parts = {}
    for name, true in truth.items():
        narrow = dtype.itemsize == 2 and name.startswith("d ")
        constant = NARROW_ROUNDINGS * torch.finfo(dtype).eps / 2 if narrow else FLOAT32_CONSTANT
        parts[name] = Part(found[name], true, Part(yardstick[name], true, 0.0).error + constant)
    return parts
