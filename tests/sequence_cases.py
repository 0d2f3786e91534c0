"""Heads whose rows several processes share, and a sequence whose rows they share too: problems cut both ways, and the parts put
together again."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from compare import DIVERGENCES, OPTIONS, TENSORS, Model, Outcome, Problem, gradients, random_problem
from shard_cases import ROWS_OF, shard_of, stops_of
from torch import Tensor

import topd

VOCABS = (5, 37, 38)
N = 12  # rows of the whole sequence: 6, 4 or 3 a rank


def starts_of(ranks: int, vocab: int) -> tuple[int, ...]:
    """Return the first token of each rank as torch.chunk cuts; of 5 tokens the last of four ranks has none."""
    rows = -(-vocab // ranks)
    return tuple(min(rank * rows, vocab) for rank in range(ranks))


def rows_of_rank(value: Tensor | None, rank: int, ranks: int) -> Tensor | None:
    """Return this rank's rows [N / R, ...] of the whole sequence."""
    return None if value is None else value.chunk(ranks)[rank].clone()


def split(problem: Problem, rank: int, ranks: int) -> Problem:
    """Return the problem with this rank's rows of the sequence, the vocabulary whole."""

    def cut(model: Model) -> Model:
        return replace(model, hidden=rows_of_rank(model.hidden, rank, ranks))

    mask, tokens = (rows_of_rank(value, rank, ranks) for value in (problem.mask, problem.tokens))
    return replace(problem, student=cut(problem.student), teacher=cut(problem.teacher), mask=mask, tokens=tokens)


def head_of(model: Model, start: int, vocab: int) -> topd.Head:
    """Return the head of a rank's model."""
    shard = topd.VocabShard(dist.group.WORLD, start, vocab, sequence_parallel=True)
    adapter = None if model.a is None else topd.LowRank(model.a, model.b, model.scaling)
    return topd.Head(model.weight, model.bias, scale=model.scale, softcap=model.softcap, adapter=adapter, shard=shard)


def sides_of(
    problem: Problem, starts: tuple[int, ...], rank: int, trainable: tuple[str, ...] = TENSORS
) -> tuple[Model, tuple[Any, ...]]:
    """Return this rank's student, whose tensors are leaves, and the first four arguments of the divergences."""
    mine = split(problem, rank, len(starts))
    student, teacher = shard_of(mine.student, starts, rank).leaves(trainable), shard_of(mine.teacher, starts, rank)
    own = head_of(student, starts[rank], problem.student.weight.shape[0])
    other = head_of(teacher, starts[rank], problem.teacher.weight.shape[0])
    return student, (student.hidden, own, teacher.hidden, other)


def outcome(
    problem: Problem, starts: tuple[int, ...], rank: int, upstream: Tensor, hint: Tensor | None = None, **options: Any
) -> dict[str, Any]:
    """Return this rank's values, gradients and scores; upstream and hint are those of the whole sequence."""
    ranks = len(starts)
    student, sides = sides_of(problem, starts, rank)
    options |= split(problem, rank, ranks).options() | {"weights_hint": rows_of_rank(hint, rank, ranks)}
    value, scores = topd.linear_divergence(*sides, return_scores=True, **options)
    uniform = upstream.numel() > 0 and upstream.stride(0) == 0
    mine = upstream[: value.numel()] if uniform else rows_of_rank(upstream, rank, ranks)
    fields = {name: getattr(scores, name) for name in scores.__dataclass_fields__}
    return {"value": value.detach(), "grads": gradients(value, mine, student), "scores": fields}


def whole(parts: list[dict[str, Any]], starts: tuple[int, ...], vocab: int) -> Outcome:
    """Return what the ranks have together: rows one rank's after the other's, the head's by tokens; `a` is the same bits
    everywhere."""
    grads = {}
    held = [max(0, min(stop, vocab) - start) for start, stop in zip(starts, stops_of(starts, vocab), strict=True)]
    for name in parts[0]["grads"]:
        each = [part["grads"][name] for part in parts]
        if name == "hidden":
            grads[name] = torch.cat(each)
        elif name in ROWS_OF:
            assert not any(grad[rows:].any() for grad, rows in zip(each, held, strict=True)), f"padding of {name} has one"
            grads[name] = torch.cat([grad[:rows] for grad, rows in zip(each, held, strict=True)])
        else:
            assert all(torch.equal(grad, each[0]) for grad in each), name
            grads[name] = each[0]
    return Outcome(torch.cat([part["value"] for part in parts]), grads)


def problems() -> Iterable[tuple[str, Problem]]:
    """Yield problems of every option and every divergence, by name; each divergence meets each vocabulary."""
    for shift, (name, options) in enumerate(OPTIONS.items()):
        for number, divergence in enumerate(DIVERGENCES):
            torch.manual_seed(100 * shift + number)
            vocab = VOCABS[(shift + number) % len(VOCABS)]
            yield f"{name} {vocab} {divergence}", random_problem(options, divergence, n=N, vocab=vocab)


class Counting:
    """Counts the collectives inside of a `with`; `asynchronous`: those that nobody waits for at once; `rows`: of each gather
    of matrices."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {"all_gather": 0, "all_reduce": 0, "reduce_scatter_single": 0}
        self.asynchronous, self.rows = dict(self.counts), []

    def __enter__(self) -> "Counting":
        self.originals = {name: getattr(dist, name) for name in self.counts}
        for name, original in self.originals.items():
            setattr(dist, name, self.counting(name, original))
        return self

    def counting(self, name, original):
        def call(*args, async_op=False, **options):
            self.counts[name] += 1
            self.asynchronous[name] += async_op
            if name == "all_gather" and async_op:
                self.rows.append(args[1].shape[0])
            return original(*args, async_op=async_op, **options)

        return call

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)
