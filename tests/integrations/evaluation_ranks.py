"""Two ranks on which both trainers evaluate five rows, two a batch; started by test_evaluation_ranks.py.

The sampler gives the first rank the rows 0, 1 and 4, 0, the second one 2, 3 and 1, 2: three of them come twice.
"""

import os
import sys
from pathlib import Path

import torch
from tiny_trl_cases import collated_pairs, pair_columns, trainer_of
from trainer_cases import MEASURED, arguments, eight_pairs, models, prompts, rows_of
from two_ranks import fork

import topd
from topd.integrations.rollouts import pack_rollouts
from topd.integrations.transformers import DistillationTrainer
from topd.integrations.trl import TOPDTrainer

BATCH = {"per_device_eval_batch_size": 2}
SAMPLED = {"max_new_tokens": 3, "temperature": 0.0, "samples_per_prompt": 2}


def packed(rows):
    """Return rows of `eight_pairs` as a packed batch; all rows of it are as wide as they were."""
    return pack_rollouts({key: torch.stack([row[key] for row in rows]) for key in rows[0]})


def by_transformers(folder, collate=None):
    objective = topd.TRD(*models(), topd.TRDConfig(**MEASURED))
    options = arguments(folder, **BATCH, **ranks())
    return DistillationTrainer(objective, options, collate).evaluate(rows_of(eight_pairs())[:5])


def sampled(folder):
    """Two greedy answers to each of three prompts, of which one comes twice."""
    objective = topd.OPD(*models())
    return DistillationTrainer(objective, arguments(folder, **BATCH, **ranks()), rollout=SAMPLED).evaluate(
        rows_of(prompts())[:3]
    )


def by_trl(folder):
    columns = {key: values[:5] for key, values in pair_columns().items()}
    trainer = trainer_of(
        folder,
        TOPDTrainer,
        columns=columns,
        given_models=tuple(model.double() for model in models()),
        given_arguments=BATCH | ranks(),
        data_collator=collated_pairs,
        objective_config=topd.TRDConfig(**MEASURED),
    )
    return trainer.evaluate()


def ranks():
    """Return what two ranks' arguments have beside."""
    return {"ddp_backend": "gloo"} if "RANK" in os.environ else {}


def everything(folder):
    """Return the metrics of each way."""
    return {
        "pairs": by_transformers(folder),
        "packed": by_transformers(folder, packed),
        "sampled": sampled(folder),
        "trl": by_trl(folder),
    }


if __name__ == "__main__":
    fork(lambda rank: everything(Path(sys.argv[1])))
