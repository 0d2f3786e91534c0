"""Processes whose candidates are judged together; started by test_gate_processes.py as a process of its own."""

import os

import torch
from gate_cases import CASES, GREEDY, OF_EIGHT, eight_rollouts, rows_of, step_of
from two_ranks import fork

RANKS = int(os.environ["WORLD_SIZE"])
# Of two ranks also parts of unequal size, and one without a rollout.
SPLITS = {"even": [8 * rank // RANKS for rank in range(RANKS + 1)]}
if RANKS == 2:
    SPLITS |= {"uneven": [0, 5, 8], "empty": [0, 0, 8]}


def work(rank):
    torch.distributed.init_process_group("gloo")
    world, whole = torch.distributed.group.WORLD, eight_rollouts()
    results = {}
    for name, (*starts, _) in SPLITS.items():
        part = rows_of(whole, starts[rank], SPLITS[name][rank + 1])
        for case, options in CASES.items():
            if case == "lowest" or (name == "even" and (RANKS == 2 or case in OF_EIGHT)):
                results[f"{name} {case}"] = step_of(options, part, whole, group=world, calls=2 if case == "running" else 1)
    part = rows_of(whole, SPLITS["even"][rank], SPLITS["even"][rank + 1])
    if RANKS == 2:
        results["own items"] = step_of(GREEDY, part, whole, group=world, given=False)
        results["alone"] = step_of(GREEDY, part, whole)
    return results


if __name__ == "__main__":
    fork(work)
