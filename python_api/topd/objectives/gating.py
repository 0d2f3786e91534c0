"""TOPD's gate in training: the rule, which processes' candidates it judges together, and the distances that
"running_quantile" remembers, the same in all of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_tensor
from topd.near_future.gate import divergent
from topd.objectives.method import Method, check_state
from topd.ops.shared.collectives import gathered, gathered_parts
from topd.options import GateRule
from topd.vocab_shard import VocabShard

if TYPE_CHECKING:  # some builds of torch have none
    from torch.distributed import ProcessGroup

# How many candidates "running_quantile" remembers. The share below an estimated 0.3-quantile then errs by
# sqrt(0.3 * 0.7 / 256), 2.9 percent points, where 8 candidates alone err by 16; and 256 are few enough to follow a
# student whose distances fall.
MEMORY = 256
DISTANCES = "distances"  # their key in a state


class Verdict(NamedTuple):
    """What the gate decided.

    Attributes:
        divergent: [m] bool, which of this process's candidates really diverge.
        candidates: how many were judged together.
        points: [], how many of those diverge.
        items: [], the denominators of all processes' parts together, float64; None where this process judged its part alone.
    """

    divergent: Tensor
    candidates: int
    points: Tensor
    items: Tensor | None = None


class _Candidates(NamedTuple):
    """The distances of all candidates that are judged together, this process's from `first` to `last`; the distances at tokens
    of low loss, where the rule compares with them; the denominators together."""

    distance: Tensor
    low_loss: Tensor | None
    first: int
    last: int
    items: Tensor | None = None


class Gate(Method):
    """A rule of `divergent` with what it keeps between calls.

    Args:
        rule, value: as of `divergent`.
        group: the processes whose candidates are judged together; None: this one's alone, but of "running_quantile" those of
            all processes.
    """

    def __init__(self, rule: GateRule, value: float | None, group: "ProcessGroup | None" = None) -> None:
        self.rule, self.value, self.group = rule, value, group
        self.remembers = rule == "running_quantile"
        self._distances = torch.empty(0)
        self._sharing: ProcessGroup | None = None  # with which processes the student's head is shared

    def __call__(self, distance: Tensor, low_loss: Tensor | None = None, items: Tensor | None = None) -> Verdict:
        """Tell which candidates really diverge.

        Args:
            distance: [m], of a call's candidates, maybe none. With a group every process of it comes here at the same time,
                where gradients are enabled.
            low_loss: [r], the distances at tokens of low loss, where the rule compares with them.
            items: [], the denominator of this process's part; None: 0.
        """
        step = self._judged_together(distance, low_loss, items)
        reference = step.low_loss
        if self.remembers:
            known = torch.cat([self._distances.to(step.distance), step.distance])
            reference = known[-max(MEMORY, step.distance.numel()) :]
        real = divergent(step.distance, rule=self.rule, value=self.value, reference=reference)
        if self.remembers and torch.is_grad_enabled():  # in an evaluation nothing is remembered
            assert reference is not None
            self._distances = reference[-MEMORY:]
        return Verdict(real[step.first : step.last], real.numel(), real.sum(), step.items)

    def _judged_together(self, distance: Tensor, low_loss: Tensor | None, items: Tensor | None) -> _Candidates:
        """Return what all processes of the group have; this process's own, where there is none or in an evaluation, in which
        others may make fewer calls."""
        group = self.group or (all_processes() if self.remembers and self._sharing is None else None)
        if group is None or group.size() == 1 or not torch.is_grad_enabled():
            return _Candidates(distance, low_loss, 0, distance.numel())
        counts = [distance.numel(), 0 if low_loss is None else low_loss.numel()]
        mine = torch.tensor([*counts, 0.0], dtype=torch.float64, device=distance.device)
        if items is not None:
            mine[2] = items
        header = gathered(group, mine)
        own, low = header[:, :2].long().t().tolist()
        first = sum(own[: group.rank()])
        every = gathered_parts(group, distance.double(), own).to(distance.dtype)
        if low_loss is not None:
            low_loss = gathered_parts(group, low_loss.double(), low).to(low_loss.dtype)
        together = None if self.group is None else header[:, 2].sum()
        return _Candidates(every, low_loss, first, first + own[group.rank()], together)

    def check_apart(self, shard: VocabShard | None) -> None:
        """Check that the candidates of processes that share a student's head, which are the same, are judged once.

        Args:
            shard: the head's; None: one process holds it all.

        Raises:
            ValueError: several of these processes are in the group, or "running_quantile" would ask them all.
        """
        self._sharing = None if shard is None else shard.group
        if shard is None:
            return
        ranks = torch.distributed.get_process_group_ranks
        sharing, remedy = ranks(shard.group), 'give the data-parallel group, mesh.get_group("dp")'
        if self.group is not None and len(both := set(sharing) & set(ranks(self.group))) > 1:
            raise ValueError(
                f"process_group must hold one of the ranks that share the student's head, {sharing}, which have the same "
                f"rollouts, got {sorted(both)}; {remedy}, or None where all ranks share it"
            )
        if self.group is None and self.remembers and len(sharing) < torch.distributed.get_world_size():
            raise ValueError(
                'process_group must be given where gate is "running_quantile" and tensor parallelism splits the models over '
                f"some of the ranks, {sharing}, got None; {remedy}"
            )

    def state_dict(self) -> dict[str, Tensor]:
        return {DISTANCES: self._distances.clone()} if self.remembers else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        check_state(state, {DISTANCES} if self.remembers else set())
        if self.remembers:
            distances = check_tensor(f"state[{DISTANCES!r}]", state[DISTANCES], dtype=FLOATING)
            if distances.dim() != 1 or distances.numel() > MEMORY:
                raise ValueError(f"state must hold {DISTANCES} [r], {MEMORY} at most, got {list(distances.shape)}")
            self._distances = distances.clone()


def all_processes() -> "ProcessGroup | None":
    """Return the group of all processes of torch.distributed; None where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return None if torch.distributed.get_world_size() == 1 else torch.distributed.group.WORLD


def check_process_group(group: object) -> "ProcessGroup | None":
    """Check the group whose candidates are judged together, and return it."""
    if group is None or (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        return group
    raise TypeError(
        f"process_group must be a torch.distributed.ProcessGroup that holds this process, or None, got {type(group).__name__}; "
        'torch.distributed.group.WORLD is that of all processes, mesh.get_group("dp") that of a mesh\'s dimension'
    )
