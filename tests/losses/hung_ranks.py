"""Ranks of which one never comes; started by test_lost_rank.py."""

import time
from pathlib import Path
from sys import argv

import torch.distributed as dist
from two_ranks import fork


def work(rank):
    Path(argv[1], f"{rank}.pid").write_text(Path("/proc/self").resolve().name)
    if rank == 1:
        time.sleep(100)
    dist.init_process_group("gloo")
    return {}


if __name__ == "__main__":
    fork(work)
