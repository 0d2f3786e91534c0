"""Refuse what cannot run where torch's context_parallel has split the sequences of a batch over processes."""

import sys

import torch


def refuse_context_parallel(name: str, rule: str, remedy: str) -> None:
    """Refuse a call inside `torch.distributed.tensor.experimental.context_parallel`.

    Args:
        name: what is wrong there; rule: what it needs; remedy: what to do.

    Raises:
        ValueError: the call is inside it.
    """
    if in_context_parallel():
        raise ValueError(
            f"{name} must {rule}, got a call inside torch's context_parallel, under which each process has a part of each "
            f"sequence; {remedy}"
        )


def in_context_parallel() -> bool:
    """Tell whether torch's context_parallel has replaced torch's attention, as it does inside its block."""
    module = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    return torch.nn.functional.scaled_dot_product_attention in getattr(module, "_replaced_functions", {})
