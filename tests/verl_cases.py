"""A micro-batch of verl without padding, with a teacher's states and its top-k, and the losses that full logits give."""

from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import VOCAB, tiny
from torch.nested import nested_tensor_from_jagged

import topd

PROMPTS, RESPONSES, H_T, K, TEMPERATURE = (3, 5, 2), (4, 1, 6), 6, 5, 0.8
LENGTHS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
FLAGS = {
    "use_fused_kernels": True,
    "use_remove_padding": True,
    "distillation_use_topk": True,
    "distillation_only": False,
    "calculate_entropy": True,
    "temperature": TEMPERATURE,
}


def student() -> Any:
    return tiny("llama", seed=4)


def offsets_of(lengths: Any) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def draws() -> dict[str, torch.Tensor]:
    """Return tokens [N], teacher states [N, H_t] and the teacher's weight [V, H_t]."""
    draw = torch.Generator().manual_seed(7)
    total = sum(LENGTHS)
    return {
        "tokens": torch.randint(VOCAB, (total,), generator=draw),
        "hidden": torch.randn(total, H_T, generator=draw),
        "weight": torch.randn(VOCAB, H_T, generator=draw),
    }


def teacher_logprobs() -> torch.Tensor:
    """Return log p of the teacher [N, V]."""
    given = draws()
    return (given["hidden"] @ given["weight"].T).log_softmax(-1)


def batch() -> dict[str, Any]:
    """Return what verl's engine gets, as a dict."""
    given, offsets = draws(), offsets_of(LENGTHS)
    sequences = given["tokens"].split(LENGTHS)
    prompts = torch.cat([row[:n] for row, n in zip(sequences, PROMPTS, strict=True)])
    responses = torch.cat([row[n:] for row, n in zip(sequences, PROMPTS, strict=True)])
    top = teacher_logprobs().topk(K)
    return {
        "input_ids": nested_tensor_from_jagged(given["tokens"], offsets),
        "position_ids": nested_tensor_from_jagged(torch.cat([torch.arange(n) for n in LENGTHS]), offsets),
        "prompts": nested_tensor_from_jagged(prompts, offsets_of(PROMPTS)),
        "responses": nested_tensor_from_jagged(responses, offsets_of(RESPONSES)),
        "response_mask": torch.nested.as_nested_tensor([torch.ones(n) for n in RESPONSES], layout=torch.jagged),
        "teacher_hidden": nested_tensor_from_jagged(given["hidden"], offsets),
        "teacher_ids": nested_tensor_from_jagged(top.indices.int(), offsets),
        "teacher_logprobs": nested_tensor_from_jagged(top.values, offsets),
    }


def teacher_head() -> topd.Head:
    return topd.Head(draws()["weight"])


def truth(model: Any, divergence: str, *, topk: bool) -> dict[str, Any]:
    """Return what full logits of each sequence alone give: losses [B, R], log p and entropy of the response's tokens, and the
    gradients of the losses' sum."""
    columns: dict[str, list[torch.Tensor]] = {"losses": [], "log_probs": [], "entropy": []}
    starts = offsets_of(LENGTHS)
    for start, prompt, length in zip(starts, PROMPTS, LENGTHS, strict=False):
        tokens = draws()["tokens"][start : start + length]
        rows = slice(prompt - 1, length - 1)
        own = (model(tokens.unsqueeze(0)).logits[0, rows] / TEMPERATURE).log_softmax(-1)
        other = teacher_logprobs()[start : start + length][rows]
        if topk:
            values, ids = other.topk(K)
            pair = [
                torch.cat([side, (1 - side.exp().sum(-1, keepdim=True)).log()], -1) for side in (own.gather(-1, ids), values)
            ]
        else:
            tempered = (draws()["hidden"] @ draws()["weight"].T / TEMPERATURE).log_softmax(-1)
            pair = [own, tempered[start : start + length][rows]]
        p, q = pair if divergence == "reverse_kl" else pair[::-1]
        columns["losses"].append((p.exp() * (p - q)).sum(-1))
        columns["log_probs"].append(own.gather(-1, tokens[prompt:].unsqueeze(-1))[:, 0])
        columns["entropy"].append(-(own.exp() * own).sum(-1))
    padded = {name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for name, rows in columns.items()}
    padded["losses"].sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach() for name, value in padded.items()} | {"grads": grads}


def distillation_config(**options: Any) -> Any:
    """Return the part of verl's DistillationConfig that is read."""
    settings = {"loss_mode": "topd", "use_policy_gradient": False, "use_task_rewards": False, "loss_max_clamp": None}
    return SimpleNamespace(distillation_loss=SimpleNamespace(**(settings | options)))
