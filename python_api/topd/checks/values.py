"""Argument checks. Every message names the argument, the rule, what came and what to do."""

import math
import sys
from collections.abc import Iterable

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
    """A number as a message shows it: ints beyond float64's range by their length."""
    return repr(value) if isinstance(value, float) or -LARGEST <= value <= LARGEST else f"an int of {value.bit_length()} bits"


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def positive_int(name: str, value: object, *, hint: str = "") -> int:
    tail = f"; {hint}" if hint else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}{tail}")
    if value <= 0 or value > LARGEST_INT:
        rule = "> 0" if value <= 0 else f"at most {LARGEST_INT}"
        raise ValueError(f"{name} must be {rule}, got {_shown(value)}{tail}")
    return value


def tensor(name: str, value: object) -> Tensor:
    """Check for a dense tensor, one that keeps each of its entries in memory at a stride of its own. Returns it in a form that
    autograd may keep (`keepable`)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"the layout {value.layout}"
        remedy = "to_padded_tensor, with a mask," if value.is_nested else ".to_dense()"
        raise TypeError(f"{name} must be a dense tensor, got {kind}; make it one with {remedy} first")
    return keepable(value)


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
    """`keepable`, of a tensor that is differentiated where it requires grad."""
    value = keepable(value)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not value.requires_grad or not value.is_inference():
        return value
    raise ValueError(
        f"{name} must be made outside torch.inference_mode() to be differentiated, got an inference tensor that requires grad; "
        f"make or load it outside, or pass {name}.detach() where it is a constant"
    )


def floating(name: str, value: object) -> Tensor:
    """A dense tensor of one of the four floating dtypes that the kernels take."""
    checked = tensor(name, value)
    if checked.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {checked.dtype}; dequantise or cast it first"
        )
    return checked


def shaped(name: str, value: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """`what` says where the expected shape comes from."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)} ({what}), got {list(value.shape)}")
    return value


def on_device(name: str, value: Tensor, device: torch.device, other: str) -> Tensor:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, but {other} is on {device}; move them to one device")
    return value


def in_vocabulary(name: str, ids: Tensor, vocab: int, what: str, *, low: int = 0) -> Tensor:
    """ids of unmasked rows, checked to be in [low, vocab) on a CPU; on a GPU the check would stall the stream. `what` says
    whose vocabulary it is."""
    if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < low or int(ids.max()) >= vocab):
        worst = int(ids[(ids < low) | (ids >= vocab)][0])
        raise ValueError(f"{name} must lie in [0, {vocab}), {what}, where mask is True, got {worst}; mask such rows out")
    return ids


def no_second_derivative(op: str) -> RuntimeError:
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
