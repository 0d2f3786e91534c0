"""Two ranks that train students which FSDP2 shards; started by test_fsdp2.py as a process of its own."""

import torch
from fsdp2_cases import BF16, PLACES, UPSTREAMS, accumulated, models, sharded
from two_ranks import fork

import topd


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


def work(rank):
    torch.distributed.init_process_group("gloo")
    return {"places": everywhere(rank), "teachers": sharded_teachers(rank)}


if __name__ == "__main__":
    fork(work)
