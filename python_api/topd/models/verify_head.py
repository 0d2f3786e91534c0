"""Compare the logits that a model's own forward gives with those of its head, on a few random states.

The model's forward runs on a copy of the model object that shares every tensor. In it one stand-in for the base model returns
random states, and one for the output embeddings multiplies with their weight. No layer of the model runs: its modes, hooks,
gradients, caches and random numbers stay as they are, and the cost is two matrix products of three rows.
"""

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from topd.logits import shape_logits
from topd.models.head_from_model import HeadParts, base_of, unwrapped_model
from topd.models.output_layer import BUILD_BY_HAND, AdapterParts, layer_product, linear_and_adapter, local, refuse

# States of three sizes: logits near 0, and logits that a softcap holds.
SIZES = (1.0, 8.0, 64.0)
# Rounding of a few operations in the head's dtype, relative.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TOLERANCE_TF32 = 4e-3  # a GPU may multiply float32 so

# By model, what its forward and its head were when they agreed: more than one where an adapter on the head goes on and off.
_verified: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()


def verify_head(model: Any, head: HeadParts) -> None:
    """Check that the forward of the model's class makes its logits as `head` does; a model is looked at once.

    A model in which no base model is seen (a class that is not transformers') is not checked: what its head reads is unknown.
    Hooks, and a forward that was put on the object in the place of its class's, are not looked at.

    Args:
        model: as `topd.Head.from_model` takes it.
        head: as `head_from_model` reads it.

    Raises:
        ValueError: the logits differ by more than rounding, or the forward cannot run on input_ids alone.
    """
    inner = unwrapped_model(model)
    state = (type(inner).forward, head.scale, head.softcap, tuple(head.weight.shape), head.bias is None, head.adapter is None)
    if torch.compiler.is_compiling() or state in _verified.get(inner, ()):
        return
    base = base_of(inner)
    if base is not None:
        _compare(inner, base, inner.get_output_embeddings(), head)
        _verified.setdefault(inner, set()).add(state)


@torch.no_grad()
def _compare(model: nn.Module, base: nn.Module, layer: nn.Module, head: HeadParts) -> None:
    """Run the forward on a twin of the model, and refuse logits that are not the head's."""
    name, weight = type(model).__name__, local(head.weight)
    generator = torch.Generator("cpu").manual_seed(0)
    states = torch.randn(1, len(SIZES), weight.shape[1], generator=generator, device="cpu", dtype=torch.float32)
    states = torch.stack([size * state for size, state in zip(SIZES, states.unbind(1), strict=True)], dim=1)
    states = states.to(weight.device, weight.dtype)
    multiply = _Layer(layer, *linear_and_adapter(layer, name))
    twin = _with_stand_ins(model, [(base, _Body(base, states)), (layer, multiply)])
    with torch.autocast(weight.device.type, enabled=False):
        try:
            table: Any = getattr(model.get_input_embeddings(), "weight", weight)  # type: ignore[operator]
            ids = torch.zeros(states.shape[:-1], dtype=torch.int64, device=table.device)
            logits = _logits_of(type(model).forward(twin, input_ids=ids))
        except Exception as error:
            raise ValueError(
                f"model must compute its logits from last_hidden_state as its head does, which could not be checked: {name}'s "
                f"forward raised {type(error).__name__}: {error}; pass verify=False if you know that it does"
            ) from error
        product = multiply(states)[..., : weight.shape[0]].to(torch.promote_types(weight.dtype, torch.float32))
        expected = shape_logits(product, None, head.scale, head.softcap)
    _judge(logits, expected, weight, name)


def _logits_of(output: Any) -> Tensor:
    """Return the logits in what a forward returned."""
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"it returned no logits but a {type(output).__name__}")
    return logits


def _judge(logits: Tensor, expected: Tensor, weight: Tensor, name: str) -> None:
    """Refuse logits that differ from the head's by more than rounding."""
    rule = "must compute its logits from last_hidden_state as its head does"
    remedy = f"{BUILD_BY_HAND}, or pass verify=False"
    if logits.shape != expected.shape:
        came = f"logits {list(logits.shape)} where the head gives {list(expected.shape)}"
        refuse(name, rule, came, remedy)
    logits = logits.to(expected)
    tolerance = TOLERANCE[weight.dtype]
    if weight.is_cuda:
        tolerance = max(tolerance, TOLERANCE_TF32)
    finite = expected.masked_fill(~expected.isfinite(), 0.0)
    bound = tolerance * (finite.abs() + finite.square().mean(-1, keepdim=True).sqrt())
    same = (logits == expected) | ((logits - expected).abs() <= bound) | (logits.isnan() & expected.isnan())
    if not same.all():
        worst = (logits - expected).abs().masked_fill(same, 0.0).nan_to_num(torch.inf).argmax()
        came = f"a logit of {logits.flatten()[worst]:.6g} where the head gives {expected.flatten()[worst]:.6g}"
        refuse(name, rule, came, remedy)


class _Output(tuple[Tensor, ...]):
    """The output of a base model: its states first, by either name; nothing else."""

    __slots__ = ()

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Body:
    """Stands for the base model, or for one inside it that is called in its place: returns the states whatever it is given."""

    def __init__(self, base: nn.Module, states: Tensor) -> None:
        self._base, self._states = base, states

    def __call__(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output((self._states,))

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._base, name)
        return _Body(value, self._states) if hasattr(type(value), "base_model_prefix") else value


class _Layer:
    """Stands for the output embeddings: their product without hooks and wrappers."""

    def __init__(self, layer: nn.Module, linear: nn.Linear, adapter: AdapterParts | None) -> None:
        self._layer, self._linear, self._adapter = layer, linear, adapter

    def __call__(self, hidden: Tensor) -> Tensor:
        return layer_product(hidden, self._linear.weight, self._linear.bias, self._adapter)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _with_stand_ins(model: nn.Module, stand_ins: list[tuple[nn.Module, Any]]) -> nn.Module:
    """Return a copy of the model object, every tensor shared, with stand-ins in the places of parts of it."""
    names = {id(module): name for name, module in model.named_modules()}
    whole: nn.Module = _copy(model)
    for part, stand_in in stand_ins:
        *parents, last = names[id(part)].split(".")
        twin = whole
        for key in parents:
            twin._modules[key] = twin = _copy(twin._modules[key])
        twin._modules[last] = stand_in
    return whole


def _copy(module: Any) -> Any:
    """Return a copy of the object in eval mode, with its own table of modules, without hooks or a forward put on the object."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin).update(_modules=dict(module._modules), training=False)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(twin)[hooks] = OrderedDict()
    for replaced in ("forward", "_compiled_call_impl"):
        vars(twin).pop(replaced, None)
    return twin
