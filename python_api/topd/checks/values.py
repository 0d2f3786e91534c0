"""Checks of numbers, options and tensors. Every message names the argument, the rule, what came and what to do."""

import math
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

LARGEST, LARGEST_INT = sys.float_info.max, 2**63 - 1
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def real(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    hint: str = "",
) -> float:
    """Return a finite Python number within the bounds, as a float. Only comparisons: what comes in a region that torch.compile
    traces with dynamic=True may be a symbol, which math.isfinite does not take."""
    tail = f"; {hint}" if hint else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{tail}")
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if not -LARGEST <= value <= LARGEST or below or above:
        bounds = []
        if low > -math.inf:
            bounds.append(f"{'>' if open_low else '>='} {low:g}")
        if high < math.inf:
            bounds.append(f"{'<' if open_high else '<='} {high:g}")
        raise ValueError(f"{name} must be finite{' and ' if bounds else ''}{' and '.join(bounds)}, got {_shown(value)}{tail}")
    return float(value)


def _shown(value: float) -> str:
    """Return a number as a message shows it: ints beyond float64's range by their length."""
    return repr(value) if isinstance(value, float) or -LARGEST <= value <= LARGEST else f"an int of {value.bit_length()} bits"


def flag(name: str, value: object) -> bool:
    """Return True or False; refuse what merely counts as one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return one of the names that an option may have."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def positive_int(name: str, value: object, *, hint: str = "") -> int:
    """Return an int > 0 that 64 bits hold."""
    tail = f"; {hint}" if hint else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}{tail}")
    if value <= 0 or value > LARGEST_INT:
        rule = "> 0" if value <= 0 else f"at most {LARGEST_INT}"
        raise ValueError(f"{name} must be {rule}, got {_shown(value)}{tail}")
    return value


def check_temperature(temperature: object) -> float:
    """Return a temperature, a number > 0."""
    return real("temperature", temperature, low=0.0, open_low=True)


def check_workspace(workspace_bytes: object) -> None:
    """Check the bound for the tiles of logits: an int > 0, or None."""
    if workspace_bytes is not None:
        positive_int("workspace_bytes", workspace_bytes, hint="None for the default")


def check_rule_value(option: str, rule: str, name: str, value: object) -> float:
    """Return the value that goes with a rule of `select_candidates` or `divergent`: a count, a number or a fraction.

    Args:
        option: the argument that holds the rule, for the message.
        rule: the rule, already checked.
        name: the argument that holds the value.
        value: what came.
    """
    takes = f"{option}={rule!r} takes"
    if rule == "top_k":
        return positive_int(name, value, hint=f"{takes} a count of its own")
    if rule in ("threshold", "mean_plus_std"):
        return real(name, value, hint=f"{takes} a finite number of its own")
    return real(name, value, low=0.0, high=1.0, open_low=rule == "top_fraction", hint=f"{takes} a fraction")


def check_range(name: str, value: float, dtype: torch.dtype) -> None:
    """Check that a number neither overflows nor vanishes in the dtype in which a call computes."""
    info = torch.finfo(dtype)
    if value != 0 and not info.tiny <= abs(value) <= info.max:
        raise ValueError(
            f"{name} must be 0 or of magnitude {info.tiny:.3g} to {info.max:.3g}, which {dtype}, in which this call computes, "
            f"can hold, got {value!r}; choose another one{'' if dtype == torch.float64 else ', or pass float64 tensors'}"
        )


def check_tensor(
    name: str,
    value: object,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    shape: tuple[Sequence[int], str] | None = None,
    device: tuple[torch.device, str] | None = None,
) -> Tensor:
    """Check a dense tensor: one that keeps each of its entries in memory at a stride of its own.

    Args:
        name: the argument, as the caller knows it.
        value: what came.
        dtype: exactly this one, or FLOATING, any of the four that the kernels take; None: any.
        shape: the shape that it must have, and the words that say where this comes from.
        device: the device that it must be on, and the name of the argument that is there.

    Returns:
        The tensor in a form that autograd may keep (`keepable`).

    Raises:
        TypeError: no tensor, not a dense one, or of another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"the layout {value.layout}"
        remedy = "to_padded_tensor, with a mask," if value.is_nested else ".to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {kind}; make it one with {remedy} first")
    if isinstance(dtype, tuple):
        if value.dtype not in dtype:
            raise TypeError(
                f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}; dequantise or cast it first"
            )
    elif dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}; cast it with .to({dtype})")
    if shape is not None and tuple(value.shape) != tuple(shape[0]):
        raise ValueError(f"{name} must have shape {list(shape[0])} ({shape[1]}), got {list(value.shape)}")
    if device is not None and value.device != device[0]:
        raise ValueError(f"{name} is on {value.device}, but {device[1]} is on {device[0]}; move them to one device")
    return keepable(value)


def per_token(
    name: str, value: object, dtype: torch.dtype | tuple[torch.dtype, ...], hidden: Tensor, hidden_name: str
) -> Tensor:
    """Return a tensor with one entry for each row of hidden [..., H], checked and made flat, [N]."""
    shape, device = (hidden.shape[:-1], f"the leading shape of {hidden_name}"), (hidden.device, hidden_name)
    return check_tensor(name, value, dtype=dtype, shape=shape, device=device).reshape(-1)


def check_constant(name: str, value: Tensor, what: str = "the teacher") -> None:
    """Refuse a tensor that requires grad where the call differentiates nothing of it."""
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: {what} is a constant; pass {name}.detach()")


def keepable(constant: Tensor) -> Tensor:
    """Return the tensor in a form that autograd may keep for a backward pass.

    Autograd keeps no inference tensor: one is returned as an ordinary tensor on the same storage. Any other tensor is returned
    itself, and so is one that requires grad, which a tensor without a history cannot stand for.
    """
    # torch.compile cannot trace is_inference.
    if torch.compiler.is_compiling() or not constant.is_inference() or constant.requires_grad or not torch.is_grad_enabled():
        return constant
    constant = constant.resolve_neg()  # a view with a negative bit has a storage of the other sign
    empty = torch.empty(0, dtype=constant.dtype, device=constant.device)
    return empty.set_(constant.untyped_storage(), constant.storage_offset(), constant.shape, constant.stride())


def differentiable(name: str, value: Tensor) -> Tensor:
    """Return a tensor that is differentiated where it requires grad, in a form that autograd may keep (`keepable`)."""
    value = keepable(value)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not value.requires_grad or not value.is_inference():
        return value
    raise ValueError(
        f"{name} must be made outside torch.inference_mode() to be differentiated, got an inference tensor that requires grad; "
        f"make or load it outside, or pass {name}.detach() where it is a constant"
    )


def refuse_nan(name: str, value: Tensor, mask: Tensor | None, hint: str) -> None:
    """Refuse a NaN where the mask is True; only on the CPU, since on a GPU the check would stall the stream."""
    bad = value.isnan() if mask is None else value.isnan() & mask
    if value.device.type == "cpu" and bad.any():
        raise ValueError(f"{name} must not be NaN where it counts, got nan at index {bad.nonzero()[0].tolist()}; {hint}")


def in_vocabulary(name: str, ids: Tensor, vocab: int, what: str, *, low: int = 0) -> Tensor:
    """Check on a CPU that the ids of unmasked rows lie in [low, vocab), and return them; on a GPU the check would stall the
    stream. `what` says whose vocabulary it is."""
    if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < low or int(ids.max()) >= vocab):
        worst = int(ids[(ids < low) | (ids >= vocab)][0])
        raise ValueError(f"{name} must lie in [0, {vocab}), {what}, where mask is True, got {worst}; mask such rows out")
    return ids


def no_second_derivative(op: str) -> RuntimeError:
    """Return the error for an op whose backward is differentiated."""
    return RuntimeError(
        f"topd.{op} has no second derivative, but its backward was differentiated (create_graph=True); differentiate once, or "
        "write the loss from topd.Head.logits and torch.log_softmax"
    )


def no_forward_mode(op: str, tensors: Iterable[Tensor]) -> None:
    """Check that no tensor carries a tangent of forward-mode AD, which the ops would lose in silence."""
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"topd.{op} has no forward-mode derivative, but a tensor carries a tangent (torch.func.jvp, jacfwd, "
            "torch.autograd.forward_ad); use backward(), or write the loss from topd.Head.logits and torch.log_softmax"
        )
