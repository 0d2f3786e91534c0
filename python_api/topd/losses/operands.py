"""What turns hidden states and a Head into operands of an op: checks, casts as autocast makes them, the op's arguments."""

from dataclasses import replace

import torch
from torch import Tensor

from topd.checks.values import FLOATING, check_range, check_tensor, differentiable
from topd.head import Head, LowRank
from topd.ops.shared.tiles import Needs, Side


def check_head(name: str, value: object) -> Head:
    """Check for a Head."""
    if not isinstance(value, Head):
        raise TypeError(
            f"{name} must be a topd.Head, got {type(value).__name__}; build one with topd.Head(weight) or "
            "topd.Head.from_model(model)"
        )
    return value


def vocabulary_of(head: Head) -> int:
    """Return the entries of a head's vocabulary, over all ranks where it is sharded."""
    return head.weight.shape[0] if head.shard is None else head.shard.vocab


def first_tokens(head: Head, vocab: int) -> Head:
    """Return the head of the first `vocab` tokens of its vocabulary: views, no copies."""
    shard = head.shard
    if shard is None:
        return head.first(vocab)
    shard = replace(shard, vocab=vocab)
    return replace(head.first(shard.held(head.weight.shape[0])), shard=shard)


def check_side(
    hidden_name: str,
    hidden: object,
    head_name: str,
    head: object,
    *,
    device: tuple[torch.device, str] | None = None,
) -> None:
    """Check that hidden states [..., H] go with a head. `device`: where the head must be, and the name of the argument that is
    there; None: where the hidden states are."""
    head = check_head(head_name, head)
    states = check_tensor(hidden_name, hidden, dtype=FLOATING)
    width = head.weight.shape[1]
    if states.dim() < 1 or states.shape[-1] != width:
        raise ValueError(f"{hidden_name} must be [..., {width}], the width of {head_name}.weight, got {list(states.shape)}")
    device = (states.device, hidden_name) if device is None else device
    check_tensor(f"{head_name}.weight", head.weight, device=device)
    if states.dtype != head.weight.dtype and not autocast_enabled(device[0]):
        raise ValueError(
            f"{hidden_name} and {head_name}.weight must share a dtype, got {states.dtype} and {head.weight.dtype}; cast one of "
            "them, or call this under the torch.autocast under which the model ran"
        )


def check_head_range(name: str, head: Head, temperature: float, dtype: torch.dtype) -> None:
    """Check that a head's numbers, and those that the kernels make of them and the temperature, are held by dtype."""
    check_range(f"{name}.scale", head.scale, dtype)
    if head.adapter is not None:
        check_range(f"{name}.adapter.scaling", head.adapter.scaling, dtype)
    if head.softcap is not None:
        check_range(f"{name}.softcap", head.softcap, dtype)
        check_range(f"{name}.softcap / temperature", head.softcap / temperature, dtype)
        check_range(f"{name}.scale / {name}.softcap", head.scale / head.softcap, dtype)
    check_range(f"{name}.scale / temperature", head.scale / temperature, dtype)


def softcap_of(head: Head) -> float | None:
    """Return a head's softcap as the ops take it."""
    return None if head.softcap is None else float(head.softcap)


def autocast_enabled(device: torch.device) -> bool:
    """Tell whether torch.autocast is on for a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Return hidden states and head as F.linear would cast them under torch.autocast: all but float64. Hidden states in another
    memory than the head are left to the op, which casts those of a chunk."""
    device = head.weight.device
    if not autocast_enabled(device) or torch.float64 in (hidden.dtype, head.weight.dtype):
        return hidden, head
    states, head = cast(hidden if hidden.device == device else hidden[:0], head, torch.get_autocast_dtype(device.type))
    return (states if hidden.device == device else hidden), head


def cast(hidden: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor, Head]:
    """Return hidden states and head in a dtype, differentiably; a tensor of that dtype is not copied."""
    bias = None if head.bias is None else head.bias.to(dtype)
    adapter = head.adapter
    if adapter is not None:
        adapter = LowRank(adapter.a.to(dtype), adapter.b.to(dtype), adapter.scaling)
    return hidden.to(dtype), replace(head, weight=head.weight.to(dtype), bias=bias, adapter=adapter)


def kept_side(hidden_name: str, hidden: Tensor, head_name: str, head: Head) -> tuple[Tensor, Head]:
    """Return hidden states and head as autograd can keep them; refuse by name what it can neither keep nor differentiate."""
    tensors = head.tensors()
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # which cannot trace is_inference
        return hidden, head
    if not any(value.is_inference() for value in (hidden, *tensors.values())):
        return hidden, head
    hidden = differentiable(hidden_name, hidden)
    tensors = {name: differentiable(f"{head_name}.{name}", value) for name, value in tensors.items()}
    adapter = head.adapter
    if adapter is not None:
        adapter = LowRank(tensors["adapter.a"], tensors["adapter.b"], adapter.scaling)
    return hidden, replace(head, weight=tensors["weight"], bias=tensors.get("bias"), adapter=adapter)


def op_side(hidden: Tensor, head: Head) -> Side:
    """Return the operands that an op takes for one model; of a sharded head those of the rows that count."""
    if head.shard is not None and (rows := head.shard.held(head.weight.shape[0])) < head.weight.shape[0]:
        head = head.first(rows)
    low_rank = (None, None, 0.0) if head.adapter is None else (head.adapter.a, head.adapter.b, float(head.adapter.scaling))
    return Side(hidden, head.weight, head.bias, *low_rank)


def needs(hidden: Tensor, head: Head) -> Needs:
    """Tell whether hidden states, weight, bias and adapter want gradients."""
    if not torch.is_grad_enabled():
        return Needs(False, False, False, False)
    adapter = head.adapter is not None and (head.adapter.a.requires_grad or head.adapter.b.requires_grad)
    bias = head.bias is not None and head.bias.requires_grad
    return Needs(hidden.requires_grad, head.weight.requires_grad, bias, adapter)
