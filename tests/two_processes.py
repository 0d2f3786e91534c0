"""Two processes that train one step together; started by test_integrations_transformers.py as a process of its own.

The imports take longer than the step: they run once, before the fork.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch
from test_integrations_transformers import arguments, flat, four_rollouts, models, rows_of

import topd
from topd.integrations.transformers import DistillationTrainer


def train(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    objective = topd.OPD(*models())
    options = arguments(folder, ddp_backend="gloo", per_device_train_batch_size=1)
    trainer = DistillationTrainer(objective, options, train_dataset=rows_of(four_rollouts()))
    trainer.train()
    assert "forward" not in vars(objective.student)
    assert trainer.args.world_size == 2
    draws = torch.rand(4)
    torch.save(
        {"parameters": flat(objective.student), "log": trainer.state.log_history[0], "draws": draws}, folder / f"{rank}.pt"
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=train, args=(rank, Path(sys.argv[1]))) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.exit(any(process.exitcode for process in running))
