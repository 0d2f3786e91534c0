"""What the ranks of a sharded head check together before a call does any work.

Each rank runs its own checks first. Then one small all-gather tells all ranks whether each passed, and what it is about to
compute. So a wrong argument on one rank raises on every rank, and none waits for another; ranks whose calls do not belong
together are refused as well. What this cannot catch: a rank that does not make the call at all; the timeout of the
process group ends the others then. Backward passes exchange no outcomes: all ranks must run the same ones.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from topd.backends import choose_backend
from topd.checks.values import in_vocabulary
from topd.head import Head
from topd.ops.linear_divergence.spec import COMMON_VOCABULARY
from topd.ops.shared.collectives import outcomes
from topd.ops.shared.shard import WHOLE, Shard
from topd.options import BackendName
from topd.vocab_shard import Bounds, VocabShard, gap_in

if TYPE_CHECKING:  # some builds of torch have none
    from torch.distributed import ProcessGroup

# A projection of other hidden states differs by about half of their norm, that of the same ones, rounded otherwise, by a
# thousandth.
SAME_STATES = 0.02


def shard_of(head: Head) -> Shard:
    """Return how the vocabulary of a call's heads is split."""
    shard = head.shard
    return WHOLE if shard is None else Shard(shard.group, shard.start, shard.sequence_parallel)


def backend_of(backend: BackendName | None, device: torch.device, shard: Shard) -> BackendName:
    """Return the backend to run on; the rows of a vocabulary that is split are eager torch's."""
    if not shard.split or backend == "eager":
        return choose_backend(backend, device)
    if backend is None:
        return "eager"
    choose_backend(backend, device)  # an unknown one is refused as such
    raise ValueError(
        f'backend must be None or "eager" with a sharded head, got {backend!r}, which computes a row in one go and cannot '
        "exchange its sums with the other ranks in between; leave backend None"
    )


class Promise(NamedTuple):
    """What one rank is about to compute: whether its checks passed, N, a checksum of the options that must agree, a projection
    of the student's hidden states and their norm, and the tokens that each head has here."""

    passed: int = 0
    rows: int = 0
    call: int = 0
    projection: float = 0.0
    norm: float = 0.0
    student: Bounds = Bounds(0, 0)
    teacher: Bounds = Bounds(0, 0)

    def packed(self) -> list[int]:
        """Return what travels."""
        floats = struct.unpack("qq", struct.pack("dd", self.projection, self.norm))
        return [self.passed, self.rows, self.call, *floats, *self.student, *self.teacher]

    @classmethod
    def unpacked(cls, numbers: list[int]) -> "Promise":
        """Return what `packed` made travel."""
        passed, rows, call, projection, norm, *bounds = numbers
        own_start, own_stop, other_start, other_stop = bounds
        along, size = struct.unpack("dd", struct.pack("qq", projection, norm))
        return cls(passed, rows, call, along, size, Bounds(own_start, own_stop), Bounds(other_start, other_stop))


class Pact:
    """Hold what a call is about to compute: `promise`, which all ranks compare when its checks are over."""

    def __init__(self, student: VocabShard, teacher: VocabShard) -> None:
        self.vocabs, self.sequence = (student.vocab, teacher.vocab), student.sequence_parallel
        self.promise, self.call = Promise(), ""

    def sign(
        self,
        hidden: Tensor,
        student: Head,
        teacher: Head,
        options: tuple[object, ...],
        tokens: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Note a call on hidden states [N, H]; check on the CPU that tokens [N] of unmasked rows lie in the vocabulary."""
        if tokens is not None:
            in_vocabulary("tokens", tokens if mask is None else tokens[mask], min(self.vocabs), COMMON_VOCABULARY)
        heads = student, teacher
        kinds = [(head.weight.dtype, head.scale, head.softcap, sorted(head.tensors())) for head in heads]
        trained = [[value.requires_grad for value in head.tensors().values()] for head in heads]
        grads = hidden.requires_grad, trained, torch.is_grad_enabled()
        given = tokens is None, mask is None, self.sequence
        self.call = repr((options, self.vocabs, kinds, grads, hidden.dtype, *given))
        checksum = zlib.crc32(self.call.encode())
        states = (0.0, 0.0) if self.sequence else _projection(hidden.detach(), mask)  # rows of its own on every rank
        self.promise = Promise(1, hidden.shape[0], checksum, *states, student.bounds(), teacher.bounds())

    def compare(self, each: list[Promise]) -> None:
        """Refuse what the ranks do not have in common; the same error on every rank."""
        _refuse_together(each)
        rows = [promise.rows for promise in each]
        if len(set(rows)) > 1:
            same = "equally many rows" if self.sequence else "the same rows"
            raise ValueError(f"a sharded head takes {same} on every rank of its group, got {rows} rows on its ranks")
        if len({promise.call for promise in each}) > 1:
            raise ValueError(
                "all ranks of a sharded head must make the same call: options, dtypes, what is given and what requires grad, "
                f"got another one on some rank; this one's is {self.call}"
            )
        first, *others = each
        limit = SAME_STATES * max(promise.norm for promise in each)
        if any(abs(other.projection - first.projection) > limit for other in others):
            raise ValueError(
                "hidden states must be the same on every rank of a sharded head, got others on some rank: with a head that "
                "FSDP shards run the loss inside the root module's forward; where each rank has rows of its own, give both "
                "heads VocabShard(..., sequence_parallel=True)"
            )
        self._compare_bounds([promise.student for promise in each], [promise.teacher for promise in each])

    def _compare_bounds(self, student: list[Bounds], teacher: list[Bounds]) -> None:
        """Refuse shards that leave a gap, and heads that are cut at other tokens."""
        for bounds, vocab in zip((student, teacher), self.vocabs, strict=True):
            if gap := gap_in(bounds, vocab):
                raise ValueError(f"the ranks of a sharded head must hold its {vocab} tokens in their order, got a gap: {gap}")
        own, other = ([tuple(each.within(min(self.vocabs))) for each in bounds] for bounds in (student, teacher))
        if own != other:
            raise ValueError(
                f"student and teacher must be cut at the same tokens, got {own} and {other} on the ranks; pass "
                "teacher.resharded(like=student)"
            )


def _projection(hidden: Tensor, mask: Tensor | None) -> tuple[float, float]:
    """Return one number that tells hidden states [N, H] from others, and their norm; rows that are masked or not finite do not
    count."""
    n, width = hidden.shape
    along = torch.mv(hidden, torch.arange(width, device=hidden.device).cos().to(hidden.dtype)).double()
    norms = torch.linalg.vector_norm(hidden, dim=-1).double()
    counted = along.isfinite() & norms.isfinite()
    counted = counted if mask is None else counted & mask
    turns = torch.arange(n, device=hidden.device, dtype=torch.float64).cos()
    return float((along * turns)[counted].sum()), float(norms[counted].square().sum().sqrt())


def checked_together(student: object, teacher: object) -> AbstractContextManager[Pact | None]:
    """Return the context in which a call checks its arguments: with sharded heads one that the ranks leave together.

    Args:
        student, teacher: the call's heads, unchecked.

    Raises:
        ValueError: one head is sharded and one is not, or over another group; what a rank refuses, on all ranks.
    """
    own, other = (head.shard if isinstance(head, Head) else None for head in (student, teacher))
    shard = own or other
    return nullcontext() if shard is None else _together(shard.group, own, other)


@contextmanager
def _together(group: "ProcessGroup", student: VocabShard | None, teacher: VocabShard | None) -> Iterator[Pact]:
    with _refusal_told(group):
        if student is None or teacher is None or student.group != teacher.group:
            kinds = ["a whole head" if shard is None else "a sharded one" for shard in (student, teacher)]
            raise ValueError(
                f"student and teacher must be sharded over one group, or both whole, got {kinds[0]} and {kinds[1]}; give both "
                "shard=topd.VocabShard(...) over the same group"
            )
        if student.sequence_parallel != teacher.sequence_parallel:
            raise ValueError(
                f"student and teacher must agree in VocabShard.sequence_parallel, got {student.sequence_parallel} and "
                f"{teacher.sequence_parallel}; the rows of both are this rank's own, or those of all ranks"
            )
        pact = Pact(student, teacher)
        yield pact
    pact.compare(_promises(group, pact.promise))


@contextmanager
def _refusal_told(group: "ProcessGroup") -> Iterator[None]:
    """Tell the other ranks, which wait for this rank's promise, of an error."""
    try:
        yield
    except Exception:
        _promises(group, Promise())
        raise


def _promises(group: "ProcessGroup", mine: Promise) -> list[Promise]:
    """Return what each rank promises, in the order of the ranks."""
    return [Promise.unpacked(numbers) for numbers in outcomes(group, mine.packed(), _device_of(group))]


def checksum_of(tokens: Tensor) -> int:
    """Return a number that tells token ids from others. The host reads them."""
    return zlib.crc32(tokens.cpu().contiguous().numpy().tobytes())


def passed_together(*heads: object) -> AbstractContextManager[None]:
    """Return the context in which a loss that is made of others checks its own arguments: with a sharded head one that the
    ranks leave together.

    Args:
        heads: the call's heads, unchecked.

    Raises:
        ValueError: what a rank refuses, on all ranks.
    """
    shards = [head.shard for head in heads if isinstance(head, Head) and head.shard is not None]
    return _passed_together(shards[0].group) if shards else nullcontext()


@contextmanager
def _passed_together(group: "ProcessGroup") -> Iterator[None]:
    with _refusal_told(group):
        yield
    _refuse_together(_promises(group, Promise(1)))


def _refuse_together(each: list[Promise]) -> None:
    """Refuse a call that a rank has refused."""
    if refused := [rank for rank, promise in enumerate(each) if not promise.passed]:
        raise ValueError(f"the call was refused on rank {refused[0]} of the sharded head's group, whose message says why")


def _device_of(group: "ProcessGroup") -> torch.device:
    """Return the device of tensors that a group exchanges."""
    on_gpus = "gloo" not in torch.distributed.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")
