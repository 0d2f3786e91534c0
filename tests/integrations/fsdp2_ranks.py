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
from two_ranks import fork

import topd
from topd.integrations.distributed import head_method


def opd(student, teacher, batch, upstream):
    return topd.OPD(student, teacher)(batch, num_items=1).loss


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
        "method": {together: heads_method(rank, together) for together in (False, True)},
        "full_tensor()": gathered_by_hand(rank),
        "full_tensor(avg)": gathered_by_hand(rank, grad_placements=[Partial("avg")]),
    }


if __name__ == "__main__":
    fork(work)
