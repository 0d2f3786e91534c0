"""Students that teach themselves, plain and with a LoRA, and what an optimizer step makes of them."""

import copy

import pytest
import torch
from tiny_models import ragged, tiny
from torch import nn

import topd

peft = pytest.importorskip("peft")

MILD = {"initializer_range": 0.2}
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]


def plain(**options):
    """Return a float64 student whose input embeddings are frozen."""
    student = tiny("llama", **(MILD | options)).double()
    student.model.embed_tokens.requires_grad_(False)
    return student


def adapted(targets=TARGETS, *, zero=True, base=None, **options):
    """Return a student with a fresh LoRA, float64 where nothing else is said."""
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=zero, **options)
    student = peft.get_peft_model(tiny("llama", **MILD).double() if base is None else base, config)
    for name, parameter in student.named_parameters():
        if base is None and "lora_" in name:
            parameter.data = parameter.data.double()
    return student


def logits_of(model):
    """Return the logits of ragged rollouts as topd reads them; what is padding says nothing."""
    hidden, head = topd.hidden_states(model, *ragged())
    return head.logits(hidden.float() if hidden.dtype == torch.bfloat16 else hidden)


def teacher_logits(teacher):
    with teacher.in_place():
        logits = logits_of(teacher.model)
    assert not logits.requires_grad
    return logits


def step(student, seed=0, size=0.05):
    """Move all that is trained, each time another way, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size)


def frozen(student):
    """Return a dense teacher of the student's present weights."""
    return copy.deepcopy(student).eval().requires_grad_(False)


def modes(model: nn.Module):
    return [module.training for module in model.modules()]
