"""Which of a trainer's processes have parts of a step's data, and which have the same part."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from topd.objectives.gating import all_processes

if TYPE_CHECKING:  # some builds of torch have none
    from torch.distributed import ProcessGroup


class Processes:
    """The processes of a Trainer, of transformers or TRL, once it is constructed.

    Attributes:
        same: how many processes have the same part of the data: those that tensor parallelism splits a model over. Their
            ranks lie one after the other.
        parts: how many parts of the data there are.
        part: which of them this process has.
    """

    def __init__(self, trainer: Any) -> None:
        self._accelerator = trainer.accelerator
        self.same = max(int(getattr(trainer, "get_tp_size", int)()), 1)
        self.parts = self._accelerator.num_processes // self.same
        self.part = self._accelerator.process_index // self.same

    def group(self) -> "ProcessGroup | None":
        """Return the processes that have other parts of the data, this one among them: whose candidates TOPD's gate judges
        together. None where there is one part."""
        world = all_processes()
        if world is None or self.parts == 1:
            return None
        if self.same == 1:
            return world
        mesh = self._accelerator.torch_device_mesh
        group: ProcessGroup = mesh["dp"].get_group()
        return group

    def new_rows(self, rows: int) -> int:
        """Return how many of a micro-batch's rows, the first ones, are not rows that accelerate's sampler repeats.

        At the end of the data it repeats rows, so that all processes have equally many: those that `gather_for_metrics` leaves
        out. Where the data has no length it cannot tell.
        """
        state = self._accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        kept: int = min(max(state.remainder - self.part * rows, 0), rows)
        return kept

    def gather(self, value: Tensor) -> Tensor:
        """Return the values [1, ...] of one process of each part, [parts, ...]."""
        values: Tensor = self._accelerator.gather(value)
        return values[:: self.same]

    def total(self, count: Tensor) -> Tensor:
        """Return the sum of a number [] over the parts."""
        return self.gather(count.reshape(1)).sum() if self.parts > 1 else count

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self._accelerator.num_processes == 1:
            return values
        mean: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), "mean")
        return mean


def refuse_split_sequences(trainer: Any) -> None:
    """Refuse a trainer whose processes have parts of each sequence."""
    if any(getattr(trainer, size, int)() > 1 for size in ("get_cp_size", "get_sp_size")):
        raise ValueError(
            f"{type(trainer).__name__} knows no context and no sequence parallelism, got it in args; leave it out, or take "
            "tensor parallelism"
        )
