"""A step of topd.TOPD with few candidates."""

import torch

import topd

FEW = {"candidates": "top_k", "candidate_value": 3, "horizon": 6}
GREEDY = {"window_temperature": 0.0}


def step(student, teacher, batch, **options):
    generator = torch.Generator().manual_seed(5)
    return topd.TOPD(student, teacher, topd.TOPDConfig(**(FEW | options)))(batch, generator=generator)
