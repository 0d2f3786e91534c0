"""Heads whose rows several processes share: models cut into shards, and the shards' gradients put together again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compare import CONSTANT, TENSORS, Model, Outcome, Problem
from torch import Tensor

import topd

ROWS_OF = ("weight", "bias", "b")  # those that are cut; hidden and a are the same on every rank
# The first token of each rank. Uneven; a rank that holds nothing; a last rank that begins beyond a vocabulary of 41.
STARTS = {
    2: [(0, 23), (0, 41)],
    3: [(0, 7, 30), (0, 17, 17), (0, 17, 60)],
    4: [(0, 11, 22, 33), (0, 0, 40, 41), (0, 17, 17, 60)],
}
PADDING = 3  # rows at and beyond the vocabulary that the last rank holds
BUDGET = 40_000


def starts_of(ranks: int, number: int, cuts: dict[int, list[tuple[int, ...]]] = STARTS) -> list[tuple[int, ...]]:
    """Return where the ranks begin in a problem: of two all ways, of three one way after the other."""
    return cuts[ranks] if ranks == 2 else [cuts[ranks][number % len(cuts[ranks])]]


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return rows from start to stop; those beyond the end are padding, large enough to show if they counted."""
    padded = torch.cat([tensor, tensor.new_full((max(0, stop - tensor.shape[0]), *tensor.shape[1:]), 1e3)])
    return padded[start:stop].clone()


def stops_of(starts: tuple[int, ...], vocab: int) -> list[int]:
    return [*starts[1:], max(vocab, starts[-1]) + PADDING]


def shard_of(model: Model, starts: tuple[int, ...], rank: int) -> Model:
    """Return a model with this rank's rows of what is cut."""
    stop = stops_of(starts, model.weight.shape[0])[rank]
    return model.map(lambda name, value: rows_of(value, starts[rank], stop) if name in ROWS_OF else value)


def head_of(model: Model, starts: tuple[int, ...], rank: int, vocab: int) -> topd.Head:
    """Return the head of a rank's model."""
    shard = topd.VocabShard(torch.distributed.group.WORLD, starts[rank], vocab)
    adapter = None if model.a is None else topd.LowRank(model.a, model.b, model.scaling)
    return topd.Head(model.weight, model.bias, scale=model.scale, softcap=model.softcap, adapter=adapter, shard=shard)


def sides_of(
    problem: Problem, starts: tuple[int, ...], rank: int, trainable: tuple[str, ...] = TENSORS
) -> tuple[Model, tuple[Any, ...]]:
    """Return this rank's student, whose tensors are leaves, and the first four arguments of the divergences."""
    student = shard_of(problem.student, starts, rank).leaves(trainable)
    teacher = shard_of(problem.teacher, starts, rank)
    heads = (
        head_of(part, starts, rank, whole.weight.shape[0])
        for part, whole in ((student, problem.student), (teacher, problem.teacher))
    )
    own, other = heads
    return student, (student.hidden, own, teacher.hidden, other)


def side_of(model: Model, rank: int, starts: tuple[int, ...] = (0, 23)) -> tuple[Model, tuple[Tensor, topd.Head]]:
    """Return this rank's leaves of one model, and their hidden states and head."""
    leaves = shard_of(model, starts, rank).leaves(TENSORS)
    return leaves, (leaves.hidden, head_of(leaves, starts, rank, model.weight.shape[0]))


def whole(parts: list[dict[str, Any]], starts: tuple[int, ...], vocab: int) -> Outcome:
    """Return what the ranks have together: values and what is replicated are the same bits everywhere."""
    grads = dict(parts[0]["grads"])
    for part in parts[1:]:
        assert torch.equal(part["value"], parts[0]["value"])
    for name, first in grads.items():
        each = [part["grads"][name] for part in parts]
        if name not in ROWS_OF:
            assert all(torch.equal(grad, first) for grad in each), name
            continue
        held = [max(0, min(stop, vocab) - start) for start, stop in zip(starts, stops_of(starts, vocab), strict=True)]
        assert not any(grad[rows:].any() for grad, rows in zip(each, held, strict=True)), (
            f"a padded row of {name} has a gradient"
        )
        grads[name] = torch.cat([grad[:rows] for grad, rows in zip(each, held, strict=True)])
    return Outcome(parts[0]["value"], grads)


def assert_no_worse(mine: Tensor, one: Tensor, true: Tensor, what: str) -> None:
    """Check that each element is as near to the truth as one process's, but for CONSTANT of the largest; inf where it is."""
    finite, true = true.isfinite(), true.double()
    assert torch.equal(mine.isfinite(), finite), what
    assert torch.equal(mine[~finite].double(), true[~finite]), what
    error, allowed = ((each.double() - true)[finite].abs() for each in (mine, one))
    largest = true[finite].abs().max() if finite.any() else 0.0
    assert (error <= allowed + CONSTANT * largest).all(), what


def assert_outcome_no_worse(together: Outcome, single: Outcome, truth: Outcome) -> None:
    """Check the same of the value and every gradient."""
    assert_no_worse(together.value, single.value, truth.value, "value")
    assert together.grads.keys() == truth.grads.keys()
    for name, true in truth.grads.items():
        assert_no_worse(together.grads[name], single.grads[name], true, name)


@contextmanager
def counted_collectives() -> Iterator[dict[str, int]]:
    """Count the gathers and the reductions of the block, by their names in torch.distributed."""
    counts = {"all_gather": 0, "all_reduce": 0}
    originals = {name: getattr(torch.distributed, name) for name in counts}

    def counting(name: str):
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **options)

        return call

    for name in counts:
        setattr(torch.distributed, name, counting(name))
    yield counts
    for name, original in originals.items():
        setattr(torch.distributed, name, original)
