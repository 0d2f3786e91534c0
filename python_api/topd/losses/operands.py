"""Operands of the public functions: checked, flattened, cast as autocast would, unpacked into the ops' arguments."""

from typing import Any

import torch
from torch import Tensor

from topd.checks.values import differentiable, floating, on_device, positive_int, real, shaped, tensor
from topd.head import Head, LowRank


def check_head(name: str, value: object) -> Head:
    if not isinstance(value, Head):
        raise TypeError(
            f"{name} must be a topd.Head, got {type(value).__name__}; build one with topd.Head(weight) or "
            "topd.Head.from_model(model)"
        )
    return value


def check_side(hidden_name: str, hidden: object, head_name: str, head: object) -> None:
    """Check that hidden states [..., H] go with a head."""
    head = check_head(head_name, head)
    states = floating(hidden_name, hidden)
    width = head.weight.shape[1]
    if states.dim() < 1 or states.shape[-1] != width:
        raise ValueError(f"{hidden_name} must be [..., {width}], the width of {head_name}.weight, got {list(states.shape)}")
    on_device(f"{head_name}.weight", head.weight, states.device, hidden_name)
    if not autocast_enabled(states.device) and states.dtype != head.weight.dtype:
        raise ValueError(
            f"{hidden_name} and {head_name}.weight must share a dtype, got {states.dtype} and {head.weight.dtype}; cast one of "
            "them"
        )


def per_token(name: str, value: object, dtype: torch.dtype | None, hidden: Tensor, hidden_name: str) -> Tensor:
    """A tensor with one entry for each row of hidden, flat; dtype None: any floating one."""
    checked = floating(name, value) if dtype is None else typed(name, value, dtype)
    shaped(name, checked, tuple(hidden.shape[:-1]), f"the leading shape of {hidden_name}")
    return on_device(name, checked, hidden.device, hidden_name).reshape(-1)


def typed(name: str, value: object, dtype: torch.dtype) -> Tensor:
    checked = tensor(name, value)
    if checked.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {checked.dtype}; cast it with .to({dtype})")
    return checked


def check_offsets(cu_seqlens: object, packed: Tensor, name: str) -> Tensor:
    """[B + 1] int64, where the sequences of `packed` [N] begin and end; the numbers are checked on the CPU."""
    bounds = on_device("cu_seqlens", typed("cu_seqlens", cu_seqlens, torch.int32), packed.device, name).long()
    total = packed.numel()
    good = bounds.dim() == 1 and bounds.numel() >= (2 if total else 1)
    if good and bounds.device.type == "cpu":
        good = bool(bounds[0] == 0 and bounds[-1] == total and (bounds.diff() >= 0).all())
    if not good:
        rule = f"[B + 1], start at 0, never decrease and end at N = {total}, the length of {name}"
        raise ValueError(f"cu_seqlens must be {rule}, got {bounds.tolist()}; it is 0, then the cumsum of the lengths")
    return bounds


def check_temperature(temperature: object) -> float:
    return real("temperature", temperature, low=0.0, open_low=True)


def check_workspace(workspace_bytes: object) -> None:
    if workspace_bytes is not None:
        positive_int("workspace_bytes", workspace_bytes, hint="None for the default")


def check_range(name: str, value: float, dtype: torch.dtype) -> None:
    """Check that a number neither overflows nor vanishes in the dtype in which a call computes."""
    info = torch.finfo(dtype)
    if value != 0 and not info.tiny <= abs(value) <= info.max:
        raise ValueError(
            f"{name} must be 0 or of magnitude {info.tiny:.3g} to {info.max:.3g}, which {dtype}, in which this call computes, "
            f"can hold, got {value!r}; choose another one{'' if dtype == torch.float64 else ', or pass float64 tensors'}"
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
    return None if head.softcap is None else float(head.softcap)


def autocast_enabled(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Under torch.autocast, what F.linear would cast: everything floating but float64."""
    if not autocast_enabled(hidden.device) or torch.float64 in (hidden.dtype, head.weight.dtype):
        return hidden, head
    return cast(hidden, head, torch.get_autocast_dtype(hidden.device.type))


def cast(hidden: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor, Head]:
    """Return both in another dtype, differentiably; what has it is not copied."""
    bias = None if head.bias is None else head.bias.to(dtype)
    adapter = head.adapter
    if adapter is not None:
        adapter = LowRank(adapter.a.to(dtype), adapter.b.to(dtype), adapter.scaling)
    return hidden.to(dtype), Head(head.weight.to(dtype), bias, scale=head.scale, softcap=head.softcap, adapter=adapter)


def kept_side(hidden_name: str, hidden: Tensor, head_name: str, head: Head) -> tuple[Tensor, Head]:
    """Hidden states and head as autograd can keep them; what it can neither keep nor differentiate is refused by name."""
    hidden = differentiable(hidden_name, hidden)
    tensors = {name: differentiable(f"{head_name}.{name}", value) for name, value in head.tensors().items()}
    if all(tensors[name] is value for name, value in head.tensors().items()):
        return hidden, head
    adapter = head.adapter
    if adapter is not None:
        adapter = LowRank(tensors["adapter.a"], tensors["adapter.b"], adapter.scaling)
    return hidden, Head(tensors["weight"], tensors.get("bias"), scale=head.scale, softcap=head.softcap, adapter=adapter)


def op_side(hidden: Tensor, head: Head) -> tuple[Any, ...]:
    """The op's six arguments for one model."""
    low_rank = (None, None, 0.0) if head.adapter is None else (head.adapter.a, head.adapter.b, float(head.adapter.scaling))
    return (hidden, head.weight, head.bias, *low_rank)


def needs(hidden: Tensor, head: Head) -> tuple[bool, bool, bool, bool]:
    """Whether hidden, weight, bias, adapter want gradients."""
    if not torch.is_grad_enabled():
        return False, False, False, False
    adapter = head.adapter is not None and (head.adapter.a.requires_grad or head.adapter.b.requires_grad)
    return hidden.requires_grad, head.weight.requires_grad, head.bias is not None and head.bias.requires_grad, adapter
