"""Two ranks that train students which FSDP2 shards; started by test_fsdp2.py as a process of its own."""

import torch
from fsdp2_cases import (
    BF16,
    PLACES,
    UPSTREAMS,
    accumulated,
    gradients,
    models,
    sharded,
    small,
    small_batches,
    small_loss,
    whole,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial
from trainer_cases import prompts
from two_ranks import fork

import topd
from topd.integrations.distributed import head_method, inside
from topd.integrations.rollouts import sample_rollouts

ENDS = list(range(0, 61, 4))  # a quarter of the tokens end a rollout or a window
WINDOWS = {"window_temperature": 0.0, "gate": "threshold", "gate_value": 0.05, "eos_token_id": ENDS, "horizon": 6}


def opd(student, teacher, batch, upstream):
    return topd.OPD(student, teacher)(batch, num_items=1).loss


def topd_of(**options):
    """Return the loss of TOPD by these options."""
    config = topd.TOPDConfig(candidates="threshold", candidate_value=4.0, **WINDOWS | options)
    return lambda student, teacher, batch, _upstream: topd.TOPD(student, teacher, config)(batch, num_items=1).loss


LOSSES = {
    "windows": topd_of(),
    "rollout": topd_of(student_window="rollout"),
    "states": topd_of(embedding="student_hidden"),
    "no guidance": topd_of(guidance_weight=0.0),
}


def everywhere(rank):
    """The gradients for each place of the head, precision and upstream."""
    results = {}
    for place in PLACES:
        for bf16 in (False, True):
            for upstream in UPSTREAMS:
                student, teacher = models()
                sharded(student, place, **({"mp_policy": BF16} if bf16 else {}))
                results[place, bf16, upstream] = accumulated(student, teacher, rank, upstream)
    return results


def sharded_teachers(rank):
    """The gradients of an objective whose teacher is sharded too."""
    results = {}
    for place in PLACES:
        student, teacher = models()
        results[place] = accumulated(sharded(student, place), sharded(teacher, place), rank, loss=opd)
    return results


def unequal_windows(rank):
    """The gradients of TOPD where one rank has no candidates at times, and windows end early on one of them."""
    results = {}
    for place in ("root", "norm and head"):
        for method, loss in LOSSES.items():
            student, teacher = models()
            results[place, method] = accumulated(sharded(student, place), sharded(teacher, place), rank, loss=loss)
    return results


def unequal_rollouts(rank):
    """Rollouts that end early on one rank."""
    student = sharded(models()[0], "norm and head")
    first = sample_rollouts(student, **part_of(prompts(), rank), max_new_tokens=9, temperature=0.0, eos_token_id=ENDS)
    objective = topd.OPD(student, models()[1])
    loss = inside(student, lambda batch: objective(batch).loss, first)  # in step again
    return {"rollouts": first, "loss": loss.detach()}


def part_of(batch, rank):
    return {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}


def heads_method(rank, together):
    """The gradients of two chunks of tokens after the model's forward, by the head's own method; two micro-batches."""
    student, teacher = small()
    fully_shard([student.norm, student.head] if together else student.head)
    fully_shard(student)
    call = head_method(student.head)
    for index, states in enumerate(small_batches(rank)):
        student.set_requires_gradient_sync(index == 1)
        hidden = student(states)
        for chunk, other in zip(hidden.split(3), states.split(3), strict=True):
            call(lambda rows, other=other: small_loss(rows, student, other, teacher), chunk).backward(retain_graph=True)
    return gradients(student)


def gathered_by_hand(rank, **options):
    """The gradient of a head that is gathered by full_tensor, in another way than FSDP2 gathers."""
    student, teacher = small()
    fully_shard(student.head)
    fully_shard(student)
    for states in small_batches(rank):
        weight = student.head.weight.full_tensor(**options)
        value = topd.linear_divergence(student(states), topd.Head(weight), states, topd.Head(teacher))
        value.sum().backward()
    return whole(student.head.weight.grad)


def work(rank):
    torch.distributed.init_process_group("gloo")
    return {
        "places": everywhere(rank),
        "teachers": sharded_teachers(rank),
        "windows": unequal_windows(rank),
        "sampled": unequal_rollouts(rank),
        "method": {together: heads_method(rank, together) for together in (False, True)},
        "full_tensor()": gathered_by_hand(rank),
        "full_tensor(avg)": gathered_by_hand(rank, grad_placements=[Partial("avg")]),
    }


if __name__ == "__main__":
    fork(work)
