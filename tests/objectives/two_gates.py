"""Two processes that judge by the same memory; started by test_running_gate.py as a process of its own."""

import torch
from two_ranks import fork

from topd.objectives.gating import Gate

CALLS = ([0.1, 0.5, 0.9], [0.3]), ([], [0.2, 0.4]), ([0.25], [0.45, 0.05])  # of each call both processes' distances


def work(rank):
    torch.distributed.init_process_group("gloo")
    gate = Gate("running_quantile", 0.5)
    real = [gate(torch.tensor(call[rank])).divergent for call in CALLS]
    return {"real": torch.cat(real), **gate.state_dict()}


if __name__ == "__main__":
    fork(work)
