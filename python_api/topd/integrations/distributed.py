"""Models that several processes share: a loss that runs where a model is whole, and heads read from checkpoints.

from topd.integrations.distributed import inside, head_method, head_from_checkpoint, final_norm_from_checkpoint
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from topd.models.checkpoint import final_norm_from_checkpoint, head_from_checkpoint
from topd.models.data_parallel import is_sharded_in_place
from topd.models.fsdp2_state import is_sharded_by_fsdp
from topd.models.inside import inside

__all__ = ["final_norm_from_checkpoint", "head_from_checkpoint", "head_method", "inside"]

METHOD = "topd_call"


def head_method(lm_head: nn.Module) -> Callable[..., Any]:
    """Return a function `call(forward, *inputs)` that returns `forward(*inputs)` while FSDP2 holds an output layer whole::

        call = head_method(model.lm_head)
        loss = call(lambda hidden: topd.linear_divergence(hidden, topd.Head(model.lm_head.weight), *teacher).sum(), hidden)

    For an output layer that is a unit of FSDP2 by itself, or together with the last norm, and a loss that runs after the
    model's forward; it may be called several times before a backward pass, for one chunk of tokens after the other. Of a model
    of transformers take `inside`, which needs no unit of its own. The layer gets a method `topd_call` for it, by torch's
    register_fsdp_forward_method. Without FSDP2 it is a plain call.

    Args:
        lm_head: the module that `fully_shard` was applied to. `forward` builds the topd.Head of its weight anew in each call.

    Returns:
        The function. Its inputs are the student's hidden states, which FSDP2 casts to the layer's dtype where its policy says
        so; all else that `forward` reads comes by its closure. `forward` returns a tensor, or a tuple, list or dict of them.

    Raises:
        TypeError: no module.
        ValueError: FSDP2 shards the layer in a unit of a module around it.
    """
    if not isinstance(lm_head, nn.Module):
        raise TypeError(f"lm_head must be a torch.nn.Module, got {type(lm_head).__name__}")
    if not is_sharded_in_place(lm_head):
        if any(is_sharded_by_fsdp(parameter) for parameter in lm_head.parameters()):
            raise ValueError(
                f"lm_head must be a unit of FSDP2, got a {type(lm_head).__name__} that a module around it shards; call "
                "fully_shard(lm_head) before fully_shard(model), or run the loss by topd.integrations.distributed.inside"
            )
        return _call
    if METHOD not in vars(lm_head):
        from torch.distributed.fsdp import register_fsdp_forward_method

        setattr(lm_head, METHOD, _call)
        register_fsdp_forward_method(lm_head, METHOD)
    method: Callable[..., Any] = getattr(lm_head, METHOD)
    return method


def _call(forward: Callable[..., Any], *inputs: Any) -> Any:
    """Return forward(*inputs)."""
    return forward(*inputs)
