"""Run a function as the forward of what shards or wraps a model: DDP, FSDP, FSDP2, DeepSpeed.

These prepare the exchange of gradients, and gather what they shard, in the forward of what they wrap. An objective calls the
layers of a model, so it has to run inside that forward. `inside` puts any function there, without a module around it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from topd.models.data_parallel import is_deepspeed, is_in_forward, is_sharded_in_place
from topd.models.head_units import output_layers, with_whole_heads

T = TypeVar("T")


def inside(model: Any, forward: Callable[[Any], T], inputs: Any = None) -> T:
    """Return forward(inputs), computed inside the forward of what shards or wraps a model.

    There the model's layers are called as in a step of its own: what is sharded is gathered, gradients are exchanged in the
    backward pass. The output layer is gathered for as long as `forward` runs, and again in the backward pass, although its own
    forward is not called. Where the model's forward runs already nothing but the output layer is gathered; where nothing wraps
    the model, this is a plain call.

    Args:
        model: what is called in a training step: DistributedDataParallel, FullyShardedDataParallel, a DeepSpeed engine, or a
            module that `fully_shard` (FSDP2) was applied to. Its output layer is found where a model of transformers is in it.
        forward: a function of `inputs`, in which the plain model is used. It returns a tensor, a tuple, list or dict of
            them, or a dataclass that holds them in its fields, such as the result of an objective. All tensors through which
            gradients shall flow are among these. A head that it returns is not whole any more.
        inputs: handed to `forward` as they are: no wrapper moves them to another device or casts them.

    Returns:
        What `forward` returned.

    Raises:
        TypeError: forward is no function, or it returned something in which the wrapper would not find the tensors.
    """
    if not callable(forward):
        raise TypeError(f"forward must be a function of inputs, got {type(forward).__name__}")
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return inside(compiled, forward, inputs)
    content = _content(model)
    if content is None:
        return forward(inputs)
    results: list[T] = []

    def compute() -> Any:
        result = forward(inputs) if content is model else inside(content, forward, inputs)
        results.append(result)
        return _outputs(result)

    if is_in_forward(model):
        with_whole_heads(content, compute, begins=False)
        return results[0]
    if is_deepspeed(model):
        _tell_zero(content)
    if is_sharded_in_place(model):
        model.reshard()  # what a forward without a backward pass has left gathered; an optimizer may have changed it
    outputs = _redirected(model, content, lambda: with_whole_heads(content, compute))
    whole: T = _put_back(results[0], outputs)
    return whole


def shards(model: Any) -> bool:
    """Return whether a model is a wrapper that keeps parts of its parameters in other processes. DDP does not."""
    return _content(model) is not None and not isinstance(model, nn.parallel.DistributedDataParallel)


def _content(model: Any) -> Any:
    """Return the module whose forward a wrapper calls; of a module that is sharded in place itself; None where nothing wraps
    it."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(model, nn.parallel.DistributedDataParallel | FullyShardedDataParallel) or is_deepspeed(model):
        return model.module
    return model if is_sharded_in_place(model) else None


def _redirected(model: Any, content: Any, forward: Callable[[], Any]) -> Any:
    """Call a wrapper, in which `forward` takes the place of what it wraps.

    The forward is replaced on the instance until the wrapper reaches it, and is itself again before `forward` runs. The wrapper
    gets no input: some cast what they are given.
    """
    own = vars(content).get("forward")

    def restore() -> None:
        if own is None:
            vars(content).pop("forward", None)
        else:
            content.forward = own

    def redirected(_nothing: Any = None) -> Any:
        restore()
        return forward()

    content.forward = redirected
    try:
        return model(None)
    except BaseException:
        if is_sharded_in_place(model):  # or it would take every later call for a part of this one
            model.reset_iter_state()
        raise
    finally:
        restore()


def _tell_zero(content: nn.Module) -> None:
    """Tell ZeRO-3 that the forward and backward of this module read the parameters of the output layers in it."""
    partitioned = [p for layer in output_layers(content) for p in layer.parameters() if hasattr(p, "ds_id")]
    if partitioned:
        import deepspeed

        for parameter in partitioned:
            deepspeed.zero.register_external_parameter(content, parameter)


def _fields(result: Any) -> Sequence[str]:
    """Return the fields of a dataclass through which gradients flow."""
    return [
        field.name
        for field in dataclasses.fields(result)
        if isinstance(value := getattr(result, field.name), Tensor) and value.requires_grad
    ]


def _outputs(result: Any) -> Any:
    """Return what a wrapper is given of a result: it looks into tuples, lists and dicts, and into no other object."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return tuple(getattr(result, name) for name in _fields(result))
    if torch.is_grad_enabled():
        strange = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if not isinstance(leaf, _PLAIN)]
        if strange:
            raise TypeError(
                "forward must return a tensor, a tuple, list or dict of them, or a dataclass with them in its fields, got a "
                f"{type(strange[0]).__name__} in it, in which the wrapper finds no tensors; return its tensors"
            )
    return result


_PLAIN = (Tensor, int, float, str, type(None))


def _put_back(result: Any, outputs: Any) -> Any:
    """Return a result with the tensors that the wrapper returned, which may carry its hooks."""
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        return outputs
    return dataclasses.replace(result, **dict(zip(_fields(result), outputs, strict=True)))
