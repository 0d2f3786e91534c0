"""Two processes whose trainers share models by tensor parallelism; started by test_split_trainers.py.

accelerate takes tensor parallelism on GPUs alone, by a check that is left out here.
"""

import sys
from functools import partial
from pathlib import Path

import accelerate
import torch
import transformers
from split_cases import flat
from tiny_trl_cases import SGD, topd_by_trl, trainer_of, two_steps_by_trl
from trainer_cases import METHODS, arguments, prompts, rows_of, three_steps
from transformers.distributed import DistributedConfig
from two_ranks import fork

import topd
from topd.integrations.transformers import DistillationTrainer
from topd.integrations.trl import TOPDTrainer

FOLDER = Path(sys.argv[-1])


def models():
    """Return student and teacher, which the test has saved, split by transformers itself."""
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    kind = transformers.AutoModelForCausalLM
    return [
        kind.from_pretrained(FOLDER / name, dtype=torch.float64, distributed_config=config).eval()
        for name in ("student", "teacher")
    ]


def by_transformers():
    results = {}
    for method in METHODS:
        trainer = three_steps(method, FOLDER, *models())
        trainer.train()
        results[method] = {"parameters": flat(trainer.objective.student), "log": trainer.state.log_history}
    return results


def by_transformers_with_rollouts_of_its_own():
    objective = topd.OPD(*models())
    options = {"train_dataset": rows_of(prompts()), "rollout": {"max_new_tokens": 4}}
    trainer = DistillationTrainer(objective, arguments(FOLDER, max_steps=2), **options)
    trainer.train()
    return {"parameters": flat(objective.student), "draws": torch.rand(3)}


def by_trl():
    results = {}
    for method, trainer_with in (("trd", two_steps_by_trl), ("topd", partial(topd_by_trl, steps=2))):
        trainer = trainer_with(FOLDER, models(), ddp_backend="gloo")
        trainer.train()
        results[method] = {"parameters": flat(trainer.model), "log": trainer.state.log_history[:2]}
    try:
        trainer_of(FOLDER, TOPDTrainer, given_models=models(), given_arguments={"gradient_accumulation_steps": 2})
    except ValueError as error:
        results["refusal"] = str(error)
    return results


def by_trl_with_rollouts_of_its_own():
    trainer = trainer_of(
        FOLDER,
        TOPDTrainer,
        given_models=models(),
        given_arguments={"ddp_backend": "gloo", **SGD},
        objective_config=topd.OPDConfig(),
    )
    trainer.train()
    return {"parameters": flat(trainer.model)}


def work(rank):
    torch.distributed.init_process_group("gloo")
    accelerate.ParallelismConfig._validate_accelerator = lambda *given: None
    ways = by_transformers, by_transformers_with_rollouts_of_its_own, by_trl, by_trl_with_rollouts_of_its_own
    return {way.__name__: way() for way in ways}


if __name__ == "__main__":
    fork(work)
