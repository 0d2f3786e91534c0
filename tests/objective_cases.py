"""Tiny students, teachers and rollouts for the objectives."""

from tiny_models import flat_gradient, ragged, tiny

MILD = {"initializer_range": 0.2}


def models():
    return tiny("llama", **MILD), tiny("qwen3", seed=3, **MILD)


def batch_of(empty=()):
    """Return three ragged rollouts; the responses in `empty` have no token."""
    ids, mask = ragged()
    response = mask.clone()
    response[0, :9], response[1, :4], response[2, :7] = 0, 0, 0
    response[list(empty)] = 0
    return {"input_ids": ids, "attention_mask": mask, "response_mask": response}


def reduced(losses, response, reduction, num_items=None):
    counts = response.sum(-1)
    if reduction == "token":
        return losses.sum() / (num_items or counts.sum())
    return (losses.sum(-1) / counts.clamp_min(1)).sum() / (num_items or (counts > 0).sum())


def backward(model, loss):
    model.zero_grad()
    loss.backward()
    return flat_gradient(model)
