"""A call of linear_divergence on a named device: its plan, its peak of memory beside eager's and TRL's, and its time."""

from dataclasses import dataclass
from typing import Any

import torch

from topd.costs import memory
from topd.costs.devices import Device
from topd.costs.predicted import bound, predicted_time
from topd.costs.products import NARROW, products_of
from topd.costs.shapes import ModelShape
from topd.head import Head
from topd.losses.plan import Plan, plan
from topd.ops.shared.engines import engine_of
from topd.ops.shared.plan import GPU_BLOCK, ChunkPlan, default_workspace, wanted_workspace


@dataclass(frozen=True)
class LossCall:
    """A call and its backward pass, of so many tokens.

    Attributes:
        student, teacher: what is known of both models.
        n: tokens.
        dtype: of weights and hidden states.
        loss: reverse_kl, forward_kl or jsd.
        trained: the student's head is trained.
        device: None: a CPU.
    """

    student: ModelShape
    teacher: ModelShape
    n: int
    dtype: torch.dtype
    loss: str
    trained: bool
    device: Device | None

    @property
    def vocab(self) -> int:
        """Return the entries that are compared."""
        return min(self.student.vocab, self.teacher.vocab)

    @property
    def student_width(self) -> int:
        return self.student.hidden

    @property
    def teacher_width(self) -> int:
        return self.teacher.hidden

    @property
    def sizes(self) -> memory.Sizes:
        """Return what the prediction of memory asks."""
        return memory.Sizes(self.n, self.vocab, self.student_width, self.dtype.itemsize, self.trained)

    @property
    def input_bytes(self) -> int:
        """Return the bytes of both heads and both hidden states."""
        return self.dtype.itemsize * sum(side.hidden * (side.vocab + self.n) for side in (self.student, self.teacher))

    def plan(self, workspace_bytes: int | None = None) -> Plan:
        """Return topd's plan; None: at the default workspace of the device."""
        heads = [
            Head(torch.empty(side.vocab, side.hidden, dtype=self.dtype, device="meta", requires_grad=own))
            for side, own in ((self.student, self.trained), (self.teacher, False))
        ]
        if workspace_bytes is None and self.device is not None:
            width = engine_of("triton").row_width(self.vocab)
            products = products_of(self, self.trained) if self.dtype.itemsize == NARROW else None
            wanted = wanted_workspace(self.n, width, width, products=products)
            workspace_bytes = default_workspace("cuda", self.device.available_bytes, wanted=wanted)
        return plan(heads[0], heads[1], self.n, device="cuda" if self.device else "cpu", workspace_bytes=workspace_bytes)

    def peaks(self, chunks: Plan) -> dict[str, dict[str, int]]:
        """Return the parts of each way's peak beyond weights and hidden states, in bytes."""
        return {
            "eager": memory.eager_memory(self.sizes, self.loss),
            "TRL": memory.trl_memory(self.sizes, self.loss, kernels=self.device is not None),
            "topd": memory.topd_memory(chunks, self.sizes),
        }

    def time(self, chunks: Plan) -> dict[str, Any] | None:
        """Return topd's milliseconds by what bounds them; None where the model does not know the device or the dtype."""
        if self.device is None or self.dtype.itemsize != NARROW:
            return None
        rows = ChunkPlan(self.n, chunks.rows, chunks.chunks, chunks.workspace_bytes, chunks.pile, GPU_BLOCK)
        seconds = predicted_time(self, self.device, self.loss, rows, weight_grad=self.trained)
        parts = {f"{name}_ms": part * 1e3 for name, part in seconds._asdict().items()}
        return parts | {"total_ms": seconds.total * 1e3, "bound": bound(seconds)}
