"""Rank 1 dies between two calls on a sharded head; started by test_lost_rank.py."""

import os

import torch
import torch.distributed as dist
from two_ranks import fork

import topd

STARTS, VOCAB = (0, 10, 20), 30


def work(rank):
    dist.init_process_group("gloo")
    shard = topd.VocabShard(dist.group.WORLD, STARTS[rank], VOCAB)
    head = topd.Head(torch.randn(10, 4, requires_grad=True), shard=shard)
    hidden = torch.ones(5, 4)
    value = topd.linear_divergence(hidden, head, hidden, head.detach())
    value.sum().backward()
    if rank == 1:
        print("rank 1 dies", flush=True)
        os._exit(3)
    try:
        topd.linear_divergence(hidden, head, hidden, head.detach())
    except RuntimeError as error:
        print(f"rank {rank} says: {error}", flush=True)
        raise
    return {}


if __name__ == "__main__":
    fork(work)
