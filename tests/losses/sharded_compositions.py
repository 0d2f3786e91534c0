"""What is made of linear_logprobs, and topd.plan, on sharded heads, in two processes; started by test_sharded_compositions.py.
A function is named like its result."""

from dataclasses import replace

import soft_target_cases
import topk_cases
import torch
from compare import Model, Outcome, outcome_of, random_model
from shard_cases import head_of, shard_of, side_of
from two_ranks import fork_cases, message

import topd
from topd.ops.linear_divergence import loop as divergence_loop

STARTS, VOCAB = (0, 23), 41
NOT_PLANNED = ({"sequence_parallel": True}, {"start": VOCAB})
EVERYTHING = {"bias": True, "rank": 3, "softcap": 8.0, "scale": 0.8}


def compared(model: Model, rank: int, compute, truth: Outcome):
    """Return value and gradients of compute(hidden, head) on this rank's part, as `compare.outcome_of` makes the truth."""

    def on_rank(leaves: Model):
        return compute(leaves.hidden, head_of(leaves, STARTS, rank, model.weight.shape[0]))

    outcome = outcome_of(shard_of(model, STARTS, rank), None, on_rank)
    return {"value": outcome.value, "grads": outcome.grads, "truth": {"value": truth.value, "grads": truth.grads}}


def soft_targets(rank):
    model = random_model(11, VOCAB, 7, **EVERYTHING)
    (ids, probs), mask = soft_target_cases.random_targets(11, 6), torch.arange(11) % 4 != 2
    options = {"mask": mask, "temperature": 0.7}
    truth = soft_target_cases.truth(model, ids, probs, **options)
    return compared(model, rank, lambda *sides: topd.soft_target_kl(*sides, ids, probs, **options), truth)


def topk_divergence(rank):
    results = {}
    for direction, support in topk_cases.COMBINATIONS:
        model = random_model(11, VOCAB, 7, **EVERYTHING)
        (ids, logprobs), mask = topk_cases.random_teacher(11, 6), torch.arange(11) % 4 != 2
        options = {"direction": direction, "support": support, "mask": mask}
        truth = topk_cases.truth(model, ids, logprobs, **options)

        def loss(*sides, ids=ids, logprobs=logprobs, options=options):
            return topd.topk_divergence(*sides, ids, logprobs, **options)

        results[f"{direction} {support}"] = compared(model, rank, loss, truth)
    return results


def guidance(rank):
    model, plan = random_model((4, 5), VOCAB, 7, **EVERYTHING), torch.rand(4, 5, 6)
    tokens, lengths = torch.randint(VOCAB, (4, 6)), torch.tensor([5, 1, 3, 4])

    def loss(hidden, head):
        return topd.guidance_kl(hidden, head, tokens, plan, student_lengths=lengths)

    def true(leaves: Model):
        shares = plan.double() / plan.double().sum(-1, keepdim=True)
        rows = soft_target_cases.full_kl(leaves, tokens.unsqueeze(1).expand(4, 5, 6), shares)
        return rows.masked_fill(torch.arange(5) >= lengths.unsqueeze(-1), 0.0).sum(-1) / lengths

    return compared(model, rank, loss, outcome_of(model, torch.float64, true))


def entropy_aware(rank):
    """A teacher with more tokens than the student: its likeliest are taken among those that both have."""
    model, teacher = random_model(11, VOCAB, 7, **EVERYTHING), random_model(11, 53, 5, bias=True)
    options = {"top_k": 5, "entropy_threshold": 1.0, "mask": torch.arange(11) % 4 != 2}
    whole = teacher.hidden, teacher.head()
    one = outcome_of(model, None, lambda own: topd.entropy_aware_opd(own.hidden, own.head(), *whole, **options))
    part = shard_of(teacher, STARTS, rank)
    others = part.hidden, head_of(part, STARTS, rank, 53)
    return compared(model, rank, lambda *sides: topd.entropy_aware_opd(*sides, *others, **options), one)


def planned(rank):
    """topd.plan on each rank, and the chunks of the call that follows: those of the rank with the most tokens."""
    student, teacher = random_model(50, VOCAB, 7, rank=2), random_model(50, 53, 5)
    _, (hidden, head) = side_of(student, rank)
    part, seen = shard_of(teacher, STARTS, rank), []
    other, tiles = head_of(part, STARTS, rank, 53), divergence_loop.TileLoop
    plan = topd.plan(head, other, 50, workspace_bytes=30_000)

    def watched(engine, chunks, *rest, **options):
        seen.append((chunks.rows, chunks.chunks, chunks.workspace_bytes))
        return tiles(engine, chunks, *rest, **options)

    divergence_loop.TileLoop = watched
    topd.linear_divergence(hidden, head, part.hidden, other, workspace_bytes=30_000).sum().backward()
    divergence_loop.TileLoop = tiles
    split, nothing = (replace(head, shard=replace(head.shard, **change)) for change in NOT_PLANNED)
    wrong = [message(lambda own=own: topd.plan(own, other, 50)) for own in (split, nothing, student.head())]
    told = (plan.rows, plan.chunks, plan.workspace_bytes)
    return {"plan": told, "vocab": plan.vocab, "backend": plan.backend, "seen": seen, "text": str(plan), "wrong": wrong}


if __name__ == "__main__":
    fork_cases(soft_targets, topk_divergence, guidance, entropy_aware, planned)
