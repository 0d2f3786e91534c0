"""Two processes that train one step of TOPDTrainer together, on pairs; started by test_trl_pairs.py as a process of its own."""

import sys
from pathlib import Path

import torch
from tiny_trl_cases import SGD, collated_pairs, models, pair_columns, topd_by_trl, trainer_of
from trainer_cases import MEASURED, flat
from two_ranks import fork

import topd
from topd.integrations.trl import TOPDTrainer


def train(rank):
    trainer = trainer_of(
        Path(sys.argv[1]),
        TOPDTrainer,
        columns=pair_columns(),
        given_models=tuple(model.double() for model in models()),
        given_arguments={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "ddp_backend": "gloo", **SGD},
        data_collator=collated_pairs,
        objective_config=topd.TRDConfig(**MEASURED),
    )
    trainer.train()
    assert trainer.args.world_size == 2
    results = {"parameters": flat(trainer.accelerator.unwrap_model(trainer.model)), "log": trainer.state.log_history[0]}
    return results | {"topd": after_a_step_of_topd()}


def after_a_step_of_topd():
    """Two rollouts in each process, whose candidates are judged together."""
    given = tuple(model.double() for model in models())
    trainer = topd_by_trl(Path(sys.argv[1]), given, steps=1, ddp_backend="gloo")
    trainer.train()
    assert trainer.objective.process_group is torch.distributed.group.WORLD
    return flat(trainer.accelerator.unwrap_model(trainer.model))


if __name__ == "__main__":
    fork(train)
