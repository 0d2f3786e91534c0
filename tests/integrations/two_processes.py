"""Two processes that train one step together; started by test_integrations_transformers.py as a process of its own."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import torch
from loss_module import Loss
from tiny_models import flat_gradient
from trainer_cases import GATED, MEASURED, arguments, eight_pairs, flat, four_rollouts, models, rows_of
from two_ranks import fork

import topd
from topd.integrations.transformers import DistillationTrainer


def gradient_under_accelerate(rank: int) -> torch.Tensor:
    """The loop of examples/accelerate_loop.py, a micro-batch for each row."""
    accelerator, objective, batch = accelerate.Accelerator(cpu=True), topd.OPD(*models()), four_rollouts()
    model = accelerator.prepare(Loss(objective))
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    mine = [{key: value[row : row + 1] for key, value in batch.items()} for row in (2 * rank, 2 * rank + 1)]
    num_items = accelerator.gather(sum(part["response_mask"].sum() for part in mine)).sum()
    for part in mine:
        with nullcontext() if part is mine[-1] else accelerator.no_sync(model):
            accelerator.backward(model(part, num_items) * accelerator.num_processes)
    return flat_gradient(objective.student)


def after_a_step_of_pairs() -> dict[str, Any]:
    """Four micro-batches in each process; tokens per row are as unequal as can be."""
    objective = topd.TRD(*models(), topd.TRDConfig(**MEASURED))
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = DistillationTrainer(objective, arguments(Path(sys.argv[1]), **options), train_dataset=rows_of(eight_pairs()))
    trainer.train()
    return {"pairs": flat(objective.student), "pairs_log": trainer.state.log_history[0]}


def after_a_step_of_topd() -> dict[str, Any]:
    """Two rollouts in each process, whose candidates are judged together."""
    objective = topd.TOPD(*models(), GATED)
    options = {"ddp_backend": "gloo", "gradient_accumulation_steps": 1}
    trainer = DistillationTrainer(objective, arguments(Path(sys.argv[1]), **options), train_dataset=rows_of(four_rollouts()))
    assert objective.process_group is torch.distributed.group.WORLD
    trainer.train()
    return {"topd": flat(objective.student), "topd_log": trainer.state.log_history[0]}


def train(rank):
    objective = topd.OPD(*models())
    accelerate_gradient = gradient_under_accelerate(rank)
    options = arguments(Path(sys.argv[1]), ddp_backend="gloo", per_device_train_batch_size=1)
    trainer = DistillationTrainer(objective, options, train_dataset=rows_of(four_rollouts()))
    trainer.train()
    assert "forward" not in vars(objective.student)
    assert trainer.args.world_size == 2
    results = {"parameters": flat(objective.student), "log": trainer.state.log_history[0], "draws": torch.rand(4)}
    return results | {"accelerate_gradient": accelerate_gradient} | after_a_step_of_pairs() | after_a_step_of_topd()


if __name__ == "__main__":
    fork(train)
