"""TOPD's gate in training: the rule, and the distances that "running_quantile" remembers, the same in all processes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_tensor
from topd.near_future.gate import divergent
from topd.objectives.method import Method, check_state
from topd.options import GateRule

# How many candidates "running_quantile" remembers. The share below an estimated 0.3-quantile then errs by
# sqrt(0.3 * 0.7 / 256), 2.9 percent points, where 8 candidates alone err by 16; and 256 are few enough to follow a
# student whose distances fall.
MEMORY = 256
DISTANCES = "distances"  # their key in a state


class Gate(Method):
    """A rule of `divergent` with what it keeps between calls.

    Args:
        rule, value: as of `divergent`.
    """

    def __init__(self, rule: GateRule, value: float | None) -> None:
        self.rule, self.value = rule, value
        self._remembers = rule == "running_quantile"
        self._distances = torch.empty(0)

    def __call__(self, distance: Tensor, low_loss: Tensor | None = None) -> Tensor:
        """Tell which candidates really diverge, [m] bool.

        Args:
            distance: [m], of a call's candidates. Every process of torch.distributed comes here at the same time where the rule
                remembers and gradients are enabled.
            low_loss: [r], the distances at tokens of low loss, where the rule compares with them.
        """
        if not self._remembers:
            return divergent(distance, rule=self.rule, value=self.value, reference=low_loss)
        trains = torch.is_grad_enabled()  # in an evaluation nothing is remembered, and other processes are not asked
        own = of_all_processes(distance) if trains else distance
        known = torch.cat([self._distances.to(own), own])[-max(MEMORY, own.numel()) :]
        real = divergent(distance, rule=self.rule, value=self.value, reference=known)
        if trains:
            self._distances = known[-MEMORY:]
        return real

    def state_dict(self) -> dict[str, Tensor]:
        return {DISTANCES: self._distances.clone()} if self._remembers else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {DISTANCES} if self._remembers else set())
        if self._remembers:
            distances = check_tensor(f"state[{DISTANCES!r}]", state[DISTANCES], dtype=FLOATING)
            if distances.dim() != 1 or distances.numel() > MEMORY:
                raise ValueError(f"state must hold {DISTANCES} [r], {MEMORY} at most, got {list(distances.shape)}")
            self._distances = distances.clone()


def of_all_processes(values: Tensor) -> Tensor:
    """Return the values [m] of every process of torch.distributed, in their order; m may differ. Of one process its own."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    count = torch.tensor([values.numel()], device=values.device)
    counts = [torch.empty_like(count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    padded = torch.nn.functional.pad(values, (0, max(sizes) - values.numel()))
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
