"""Eight rollouts in one process or in several that judge their candidates together; a step of each."""

import torch
from objective_cases import models
from tiny_models import VOCAB
from topd_cases import GREEDY

import topd

# Tokens of the eight responses: unequal, two rows without any, the same number of tokens in both halves.
LENGTHS = (9, 0, 2, 6, 0, 9, 6, 2)
WIDTH = 20
SHARED = {"window_noise": "shared"}
CASES = {
    "lowest": {**GREEDY, "false_alarms": "cap"},
    "lowest shared": {**SHARED, "gate_value": 0.5, "reduction": "sequence"},
    "std": {**GREEDY, "gate": "mean_plus_std", "gate_value": 0.3},
    "std tokens": {**SHARED, "gate": "mean_plus_std", "gate_value": 0.1, "guidance_reduction": "tokens"},
    "threshold": {**GREEDY, "gate": "threshold", "gate_value": 0.8},
    "running": {**GREEDY, "gate": "running_quantile", "gate_value": 0.6, "reduction": "sequence"},
    "low loss": {**GREEDY, "gate": "low_loss_q3", "false_alarms": "mask"},
}
OF_EIGHT = ("lowest", "std tokens")  # the cases that eight processes take
FEW = {"candidates": "top_k", "candidate_value": 2, "horizon": 4, "guidance_weight": 1.0}


def eight_rollouts():
    generator = torch.Generator().manual_seed(3)
    response = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        response[row, WIDTH - length :] = 1
    ids = torch.randint(VOCAB, response.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": response}


def rows_of(batch, start, stop):
    return {key: value[start:stop] for key, value in batch.items()}


def items_of(batch, reduction):
    response = batch["response_mask"] > 0
    return int(response.sum() if reduction == "token" else response.any(-1).sum())


def gradient_of(parameter):
    """Return a parameter's gradient, put together where it is split."""
    return parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad


def step_of(options, part, whole, *, group=None, given=True, calls=1, prepared=lambda model: model):
    """Return what a process makes of its part of a batch: decisions, loss and gradient, of so many calls together."""
    student, teacher = (prepared(model.double()) for model in models())
    config = topd.TOPDConfig(**FEW | options)
    objective = topd.TOPD(student, teacher, config, process_group=group)
    items = items_of(whole, config.reduction) if given else None
    results = [objective(part, num_items=items, generator=torch.Generator().manual_seed(5)) for _ in range(calls)]
    near = results[-1].near_future
    loss = sum(result.loss for result in results)
    loss.backward()
    return {
        "distance": near.transport.distance,
        "divergent": near.divergent,
        "loss": loss.detach(),
        "guidance": results[-1].metrics["guidance_loss"],
        "gradient": torch.cat([gradient_of(parameter).reshape(-1) for parameter in student.parameters()]),
    }
