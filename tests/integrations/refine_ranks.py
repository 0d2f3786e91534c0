"""Two ranks with FSDP2's shards of both models, of which one has nothing to refine; started by test_refine_ranks.py."""

import warnings
from datetime import timedelta

import torch
from fsdp2_cases import models_of_characters, sharded
from trd_cases import TOKENIZER
from two_ranks import fork

import topd
from topd.integrations.distributed import inside
from topd.integrations.refine_rollout import RefineRollout

# The second rank's problems alone are longer than a refine prompt may be.
PROBLEMS = (["1 + 1?", "Name a number."], ["2 + 2? " * 200, "3 + 3? " * 200])
OPTIONS = {"max_new_tokens": 5, "refine_max_new_tokens": 7, "max_prompt_tokens": 1_000, "temperature": 0.0}


def prompts(rank):
    """Return the student's prompts of a rank: a token each."""
    ids = torch.tensor([[41 + rank], [47 + rank]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "problem": PROBLEMS[rank]}


def refined(student, teacher, rank):
    """Return the pairs of a rank, their loss and what became of the refinements."""
    refine = RefineRollout(teacher, TOKENIZER, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = refine(student, prompts(rank))
    objective = topd.TRD(student, teacher)
    loss = inside(student, lambda batch: objective(batch, num_items=10).loss, pairs)
    return {"pairs": pairs, "loss": loss, "counts": dict(refine.counts)}


def work(rank):
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    student, teacher = (sharded(model, "own unit") for model in models_of_characters())
    result = refined(student, teacher, rank)
    result["loss"].backward()
    gradients = {name: each.grad.full_tensor() for name, each in student.named_parameters()}
    return result | {"loss": result["loss"].detach(), "gradients": gradients}


if __name__ == "__main__":
    fork(work)
