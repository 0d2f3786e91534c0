"""A sequence that ranks share, at the edges, in two processes; started by test_sequence_edges.py. A function is named like its
result."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from compare import Outcome, Problem, by_topd, gradients, plain, random_problem
from house.pages import DOCS, blocks_of
from objective_cases import batch_of, models
from sequence_cases import Counting, outcome, rows_of_rank, sides_of
from shard_cases import sides_of as sides_of_all_rows
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from two_ranks import fork_cases, message

import topd
from topd.ops.shared import engines, hidden_sums
from topd.ops.shared import loop as tile_loop

STARTS, RANKS = (0, 23), 2
EVERYTHING = {"student": {"bias": True, "rank": 3, "softcap": 8.0}, "teacher": {"vocab": 53, "bias": True}, "mask": True}
SMALL = 4 * 20 * 23 * 8  # bytes of a chunk of four rows in float64


def truth(problem: Problem, upstream: torch.Tensor) -> dict[str, Any]:
    """Return values and gradients on whole heads and all rows."""
    expected: Outcome = plain(problem, upstream)
    return {"value": expected.value, "grads": expected.grads}


def uneven_masks(rank):
    """No row of the first rank, all of the second; and one alone."""
    results = []
    for kept in ([6, 7, 8, 9, 10, 11], [8], [0, 1, 2, 3, 4, 11]):
        mask = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)
        sides = {name: EVERYTHING[name] for name in ("student", "teacher")}
        problem = replace(random_problem(sides, n=12), mask=mask)
        problem.student.hidden[~mask] = torch.nan
        problem.tokens[~mask] = -100
        upstream = torch.linspace(-1, 2, 12)
        part = outcome(problem, STARTS, rank, upstream, workspace_bytes=30_000)
        results.append(part | {"truth": truth(problem, upstream)})
    return {"each": results}


def no_rows(rank):
    grads = []
    for n in (0, 12):
        problem = random_problem({"student": {"bias": True, "rank": 2}}, n=n)
        student, sides = sides_of(problem, STARTS, rank)
        mask = torch.zeros(n // RANKS, dtype=torch.bool) if n else None
        value, scores = topd.linear_divergence(*sides, mask=mask, return_scores=True)
        grads.append({"value": value.detach(), "kl": scores.forward_kl} | gradients(value, torch.ones_like(value), student))
    return {"grads": grads}


def deviating(rank):
    """Upstream gradients that deviate from a right hint in 0, 3 and 100 % of 34 rows, and from a wrong one."""
    hint, results = torch.linspace(0.5, 2, 34, dtype=torch.float64), {}
    for name in ("0 %", "3 %", "100 %"):
        torch.manual_seed(0)
        problem = random_problem(EVERYTHING | {"hard_weight": 0.3}, topd.JSD(0.3), n=34)
        last = problem.mask.nonzero()[-1]
        upstreams = {"0 %": 4 * hint, "3 %": hint.index_fill(0, last, 0.1), "100 %": torch.linspace(-1, 2, 34).sin()}
        upstream = upstreams[name]
        with Counting() as said:
            part = outcome(problem, STARTS, rank, upstream, hint, workspace_bytes=SMALL)
        results[name] = part | {"truth": truth(problem, upstream), "said": said.counts}
    problem = random_problem(EVERYTHING, topd.TotalVariation(), n=34)
    results["wrong"] = outcome(problem, STARTS, rank, hint, 1 / hint, workspace_bytes=SMALL)
    results["wrong"]["truth"] = truth(problem, hint)
    return results


def own_scalars(rank):
    """Each rank sends another number to all its rows, as `loss.mean()` over its own tokens would."""
    problem = random_problem({}, n=12)
    student, sides = sides_of(problem, STARTS, rank)
    value = topd.linear_divergence(*sides)
    grads = gradients(value, torch.tensor(1.0 + rank).expand(6), student)
    upstream = torch.tensor([1.0, 2.0]).repeat_interleave(6)
    return {"value": value.detach(), "grads": grads, "truth": truth(problem, upstream)}


def twice(rank):
    """The same call again, with rows that are computed again, and a second backward pass."""
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        problem = random_problem(EVERYTHING, n=34).to(torch.float32)
        results.append(outcome(problem, STARTS, rank, torch.linspace(-1, 2, 34).sin(), workspace_bytes=SMALL))
    student, sides = sides_of(problem, STARTS, rank)
    value = topd.linear_divergence(*sides)
    for _ in range(2):
        value.backward(torch.linspace(-1, 2, 17), retain_graph=True)
        results.append({"weight": student.weight.grad.clone()})
    return {"each": results}


def waiting(rank):
    """Sums that run beside the next chunk are the bits of sums that are waited for, with all rows on every rank and with rows
    of its own."""
    results, originals = {}, (hidden_sums.adding_up, hidden_sums.adding_up_parts)

    def blocking(begin):
        def call(*args):
            work = begin(*args)
            work.wait()
            return work

        return call

    for name, sides in (("all rows", sides_of_all_rows), ("own rows", sides_of)):
        for waits in (False, True):
            begins = map(blocking, originals) if waits else originals
            hidden_sums.adding_up, hidden_sums.adding_up_parts = begins
            torch.manual_seed(0)
            problem = random_problem({"student": {"rank": 2}}, n=34).to(torch.float32)
            student, both = sides(problem, STARTS, rank)
            topd.linear_divergence(*both, workspace_bytes=SMALL).sum().backward()
            results[name, waits] = student.hidden.grad
    hidden_sums.adding_up, hidden_sums.adding_up_parts = originals
    return results


def collectives(rank):
    """What calls of three chunks say, of rows of one's own and of all rows."""
    results = {}
    for name, sides in (("own rows", sides_of), ("all rows", sides_of_all_rows)):
        _, both = sides(random_problem({}, n=12), STARTS, rank)
        with Counting() as forward:
            value = topd.linear_divergence(*both, workspace_bytes=SMALL)
        with Counting() as backward:
            value.sum().backward(retain_graph=True)
        with Counting() as redone:
            value.backward(torch.linspace(1, 2, value.numel()).double())
        each = {"forward": forward, "backward": backward, "redone": redone}
        results[name] = {key: (said.counts, said.asynchronous, said.rows) for key, said in each.items()}
    return results


def planted_faults(rank):
    """Gradients without the other shards' terms, and those of the other rank's rows: values stay exact."""
    original, results = hidden_sums.adding_up_parts, {}

    class Done:
        def wait(self) -> None:
            return None

    def own_terms_alone(group, mine, out):
        out.copy_(mine[rank])
        return Done()

    def wrong_slice(group, mine, out):
        return original(group, mine.flip(0), out)

    for fault in (own_terms_alone, wrong_slice, original):
        torch.manual_seed(0)
        problem, upstream = random_problem({}, n=12), torch.ones(12)
        hidden_sums.adding_up_parts = fault
        part = outcome(problem, STARTS, rank, upstream)
        results[fault.__name__] = part | {"truth": truth(problem, upstream)}
    hidden_sums.adding_up_parts = original
    return results


def a_row_without_a_distribution(rank):
    """A hidden state of NaN on the second rank: its value is NaN, and the weight's gradient on both ranks."""
    problem = random_problem({}, n=12)
    problem.student.hidden[8] = torch.nan
    return outcome(problem, STARTS, rank, torch.ones(12))


def piles(rank):
    """Products of 16 bits, several chunks of which wait for one product, as on a GPU: here the CPU plays one."""
    problem, upstream = random_problem({"student": {"bias": True}}, n=34).to(torch.bfloat16), torch.ones(34)
    multiplies, original, seen = engines.Eager.multiplies, tile_loop.plan_chunks, []

    def planned(*args, **options):
        seen.append(original(*args, **options))
        return seen[-1]

    engines.Eager.multiplies, tile_loop.plan_chunks = (lambda self, dtype, device: True), planned
    part = outcome(problem, STARTS, rank, upstream, workspace_bytes=3000)
    alone = by_topd(problem, "eager", upstream, workspace_bytes=6000)
    engines.Eager.multiplies, tile_loop.plan_chunks = multiplies, original
    plans = [(plan.pile, plan.chunks) for plan in seen]
    single = {"value": alone.value, "grads": alone.grads}
    return part | {"truth": truth(problem.to(torch.float64), upstream), "alone": single, "plans": plans}


def opd(rank):
    """OPD over two halves of the columns: the state at the last column of the first half predicts the first token of the
    second, so tokens and mask are shifted before they are split. The code is that of the page."""
    student, teacher = (model.double() for model in models())
    batch = batch_of()
    ids, attended, response = (batch[key] for key in ("input_ids", "attention_mask", "response_mask"))
    ids, attended, response = (torch.nn.functional.pad(each, (0, each.shape[1] % 2)) for each in (ids, attended, response))
    loss = topd.OPD(student, teacher)({"input_ids": ids, "attention_mask": attended, "response_mask": response}).loss
    loss.backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()

    hidden, head = topd.hidden_states(student, ids, attended)
    with torch.no_grad():
        teacher_hidden, teacher_head = topd.hidden_states(teacher, ids, attended)
    half, third = ids.shape[1] // 2, head.weight.shape[0] // 3
    columns, rows = (slice(half), slice(third)) if rank == 0 else (slice(half, None), slice(third, None))
    names = {"topd": topd, "torch": torch, "group": dist.group.WORLD, "T": ids.shape[1], "input_ids": ids}
    names |= {"response_mask": response, "first_token": rows.start or 0, "vocab": head.weight.shape[0]}
    names |= {"my_rows": head.weight[rows], "my_teacher_rows": teacher_head.weight[rows].detach()}
    names |= {"student_hidden": hidden[:, columns], "teacher_hidden": teacher_hidden[:, columns]}
    (code,) = (block.code for block in blocks_of(DOCS / "many-devices.md") if "next_token_mask" in block.code)
    exec(code, names)
    mine, scores = names["loss"], names["scores"]
    sides = (names[name] for name in ("student_hidden", "student", "teacher_hidden", "teacher"))
    scored = topd.score_tokens(*sides, tokens=names["tokens"], mask=names["mask"])
    total = mine.detach().clone()
    dist.all_reduce(total)
    grads = {name: parameter.grad for name, parameter in student.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    crosses = bool((response[:, half - 1] & response[:, half]).any())
    whole = topd.score_tokens(
        hidden, head, teacher_hidden, teacher_head, tokens=ids.roll(-1, 1), mask=topd.next_token_mask(response)
    )
    return {
        "loss": total,
        "expected_loss": loss.detach(),
        "grads": grads,
        "expected": expected,
        "crosses": crosses,
        "logprob": scores.student_logprob,
        "scored": scored.student_logprob,
        "expected_logprob": whole.student_logprob[:, columns],
    }


def dtensors(rank):
    """A head that a DTensor made, and a teacher that is resharded: both learn that rows are split."""
    mesh, problem = init_device_mesh("cpu", (2,)), random_problem({}, n=12)
    weight = distribute_tensor(problem.student.weight, mesh, [Shard(0)]).requires_grad_()
    hidden = rows_of_rank(problem.student.hidden, rank, 2).requires_grad_()
    student = topd.Head(weight)
    student = replace(student, shard=replace(student.shard, sequence_parallel=True))
    _, (_, _, teacher_hidden, teacher) = sides_of(problem, STARTS, rank)
    teacher = replace(teacher, shard=replace(teacher.shard, sequence_parallel=False)).resharded(like=student)
    value = topd.linear_divergence(hidden, student, teacher_hidden, teacher)
    value.sum().backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad.full_tensor()}
    return {"value": value.detach(), "grads": grads, "truth": truth(problem, torch.ones(12))}


def refusals(rank):
    """Calls that do not go together: every rank gets an error, none waits."""
    problem = random_problem({}, n=12)
    _, (hidden, student, teacher_hidden, teacher) = sides_of(problem, STARTS, rank)
    tokens = torch.full((6,), 41 if rank == 1 else 3)

    def call(states=hidden, own=student, other=teacher, **options):
        return message(lambda: topd.linear_divergence(states, own, teacher_hidden[: states.shape[0]], other, **options))

    def flagged(head, flag):
        return replace(head, shard=replace(head.shard, sequence_parallel=flag))

    first = [flagged(head, rank == 0) for head in (student, teacher)]
    return {
        "rows": call(states=hidden.detach()[: 6 - rank]),
        "heads": call(other=flagged(teacher, False)),
        "ranks": call(own=first[0], other=first[1]),
        "tokens": call(tokens=tokens),
        "mask": call(mask=None if rank else torch.ones(6, dtype=torch.bool)),
        "small": call(workspace_bytes=100),
    }


if __name__ == "__main__":
    fork_cases(
        uneven_masks,
        no_rows,
        deviating,
        own_scalars,
        twice,
        waiting,
        collectives,
        planted_faults,
        a_row_without_a_distribution,
        piles,
        opd,
        dtensors,
        refusals,
    )
