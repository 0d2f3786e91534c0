"""Eight processes, of which two, four or all judge their candidates together; started by test_gate_processes.py as a process of
its own."""

import torch
from gate_cases import CASES, GREEDY, OF_EIGHT, eight_rollouts, rows_of, step_of
from split_cases import split
from torch.distributed.device_mesh import DeviceMesh
from two_ranks import fork

# Where the parts of two ranks begin and end: as large as each other, of unequal size, one without a rollout.
SPLITS = {"even": (0, 4, 8), "uneven": (0, 5, 8), "empty": (0, 0, 8)}


def of_two(rank, group, whole):
    results = {}
    for name, bounds in SPLITS.items():
        part = rows_of(whole, *bounds[rank : rank + 2])
        for case, options in CASES.items() if name == "even" else [("lowest", CASES["lowest"])]:
            results[name, case] = step_of(options, part, whole, group=group, calls=2 if case == "running" else 1)
    part = rows_of(whole, 4 * rank, 4 * rank + 4)
    results["own items"] = step_of(GREEDY, part, whole, group=group, given=False)
    return results | {"alone": step_of(GREEDY, part, whole)}


def beside_tensor_parallelism(rank, mesh, whole):
    """Two parts of the rollouts, each on two ranks that share the models' layers."""
    part = rows_of(whole, 4 * (rank // 2), 4 * (rank // 2) + 4)
    options = {"group": mesh.get_group("dp"), "prepared": lambda model: split(model, mesh["tp"], head=False)}
    return step_of(CASES["lowest"], part, whole, **options)


def work(rank):
    torch.distributed.init_process_group("gloo")
    whole = eight_rollouts()
    two, mesh = torch.distributed.new_group([0, 1]), DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    part, world = rows_of(whole, rank, rank + 1), torch.distributed.group.WORLD
    results = {"eight": {case: step_of(CASES[case], part, whole, group=world) for case in OF_EIGHT}}
    if rank < 4:
        results["four"] = beside_tensor_parallelism(rank, mesh, whole)
    if rank < 2:
        results["two"] = of_two(rank, two, whole)
    torch.distributed.barrier()
    return results


if __name__ == "__main__":
    fork(work)
