"""One of two processes that train one step together; started by test_integrations_transformers.py."""

import sys
from pathlib import Path

import torch
from test_integrations_transformers import arguments, flat, four_rollouts, models, rows_of

import topd
from topd.integrations.transformers import DistillationTrainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    objective = topd.OPD(*models())
    options = arguments(folder, ddp_backend="gloo", per_device_train_batch_size=1)
    trainer = DistillationTrainer(objective, options, train_dataset=rows_of(four_rollouts()))
    trainer.train()
    assert "forward" not in vars(objective.student)
    assert trainer.args.world_size == 2
    found = {"parameters": flat(objective.student), "log": trainer.state.log_history[0]}
    torch.save(found, folder / f"{trainer.args.process_index}.pt")
    torch.distributed.destroy_process_group()
