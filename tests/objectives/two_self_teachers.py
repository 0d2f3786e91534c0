"""Two processes under DDP whose students teach themselves; started by test_opsd_processes.py as a process of its own."""

import torch
from loss_module import Loss
from pair_cases import batch_of
from self_teacher_cases import adapted, plain
from torch.nn.parallel import DistributedDataParallel
from trainer_cases import flat
from two_ranks import fork

import topd

LR = 0.5
CASES = [(build, kind) for build in (plain, adapted) for kind in ("initial", "live", "ema")]


def after_two_steps(build, kind, batch, rank=None):
    """Return the parameters after two steps of SGD, and what the teacher keeps; of one process where rank is None."""
    student, items = build(), batch["response_mask"].sum()
    objective = topd.OPSD(student, topd.OPSDConfig(teacher=kind, **({"ema_decay": 0.5} if kind == "ema" else {})))
    loss = Loss(objective)
    model = loss if rank is None else DistributedDataParallel(loss)
    mine = batch if rank is None else {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
    for _ in range(2):
        ((1 if rank is None else 2) * model(mine, num_items=items)).backward()
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=LR)
        student.zero_grad()
        objective.after_step()
    return {"parameters": flat(student), "state": objective.state_dict()}


def work(rank):
    torch.distributed.init_process_group("gloo")
    return {f"{build.__name__} {kind}": after_two_steps(build, kind, batch_of(), rank) for build, kind in CASES}


if __name__ == "__main__":
    fork(work)
