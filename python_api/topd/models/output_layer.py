"""The output layer of a model as it stands under wrappers and PEFT: a linear layer that this rank holds, and its LoRA.

peft is not imported with this module.
"""

from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from topd.checks.values import FLOATING
from topd.models.fsdp2_state import INSIDE, is_sharded_by_fsdp

BUILD_BY_HAND = "build topd.Head(weight, bias, scale=..., softcap=...) from what the model does"


class AdapterParts(NamedTuple):
    """What a LoRA adds to the output layer, with the fields of `topd.LowRank`."""

    a: Tensor
    b: Tensor
    scaling: float


def refuse(name: str, rule: str, came: str, remedy: str) -> NoReturn:
    """Refuse a model of the class `name`."""
    raise ValueError(f"model {rule}, got {came} in {name}; {remedy}")


def wrapped(module: nn.Module) -> nn.Module | None:
    """Return what torch.compile, DDP, DeepSpeed or FSDP wraps, or None."""
    children = dict(module.named_children())
    return next((children[key] for key in ("_orig_mod", "module", "_fsdp_wrapped_module") if key in children), None)


def innermost(module: nn.Module) -> nn.Module:
    """Return the module under its wrappers."""
    while (below := wrapped(module)) is not None:
        module = below
    return module


def linear_and_adapter(layer: nn.Module, name: str) -> tuple[nn.Linear, AdapterParts | None]:
    """Return the linear layer under wrappers and PEFT, its weight checked, and its LoRA."""
    layer = innermost(layer)
    children = dict(layer.named_children())
    if isinstance(getattr(layer, "original_module", None), nn.Module):
        return linear_and_adapter(_saved_copy(layer, children, name), name)
    if "base_layer" in children:
        adapter = _lora(layer, name)
        return _plain(children["base_layer"], name), adapter
    return _plain(layer, name), None


def _plain(layer: nn.Module, name: str) -> nn.Linear:
    """Check for a torch.nn.Linear whose weight this rank holds."""
    came = f"{type(layer).__module__}.{type(layer).__name__}"
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        check_held("weight", weight, name, 2)
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        refuse(name, "must have a torch.nn.Linear as its output embeddings", came, BUILD_BY_HAND)
    return layer


def check_held(what: str, tensor: Tensor, name: str, rank: int) -> Tensor:
    """Return `tensor` itself, if this rank holds all of it as plain floating numbers, or the rows of a split vocabulary, whose
    placements `topd.Head` checks."""
    rule = f"must hold the whole {what} of its head as plain numbers on this rank"
    if is_sharded_by_fsdp(tensor):
        remedy = (
            f"{INSIDE}; or gather it with {what}.full_tensor(grad_placements=[Partial('avg')] * mesh.ndim), so that gradients "
            "average over the ranks, and build topd.Head from the result"
        )
        refuse(name, rule, f"a DTensor with placements {tensor.placements}", remedy)  # type: ignore[attr-defined]
    if hasattr(tensor, "placements"):
        return tensor
    if tensor.dtype not in FLOATING or hasattr(type(tensor), "__tensor_flatten__"):
        came = f"a quantised {type(tensor).__name__} of {tensor.dtype}"
        refuse(name, rule, came, "leave lm_head out of the quantisation (skip modules), or dequantise it")
    if tensor.numel() == 0 or tensor.dim() != rank:
        remedy = f"{INSIDE}, or leave lm_head out of what is sharded"
        refuse(name, rule, f"shape {list(tensor.shape)} (sharded by ZeRO-3 or FSDP?)", remedy)
    if tensor.device.type == "meta":
        refuse(name, rule, "a meta tensor (offloaded?)", "keep lm_head on a device in device_map")
    return tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that tensor parallelism has split; another one as it is."""
    return tensor.to_local() if hasattr(tensor, "placements") else tensor  # type: ignore[attr-defined]


def layer_product(hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: Any) -> Tensor:
    """Return what an output layer with an adapter (a, b and scaling, or None) computes, as torch and PEFT round it; of tensors
    that tensor parallelism has split the part of this rank."""
    weight = local(weight)
    product = nn.functional.linear(hidden.to(weight.dtype), weight, None if bias is None else local(bias))
    if adapter is not None:
        low = nn.functional.linear(hidden.to(adapter.a.dtype), local(adapter.a))
        product = (product + adapter.scaling * nn.functional.linear(low, local(adapter.b))).to(product.dtype)
    return product


def _saved_copy(wrapper: Any, children: dict[str, nn.Module], name: str) -> nn.Module:
    """Return the module that a PEFT training wrapper (modules_to_save) calls."""
    original: nn.Module = wrapper.original_module
    active, copies = wrapper.active_adapters, children.get("modules_to_save")
    if wrapper.disable_adapters or not active:
        return original
    if not isinstance(copies, nn.ModuleDict):
        came = f"PEFT's {type(wrapper).__name__}"
        refuse(name, "may have one LoRA or modules_to_save on its head", came, "merge or disable the adapter")
    return copies[active[0]] if all(key in copies for key in active) else original


def _lora(layer: Any, name: str) -> AdapterParts | None:
    """Return the LoRA that a PEFT layer adds to its base layer as it stands; None if disabled, merged or elsewhere."""
    rule = "may have one plain LoRA on its head"
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            refuse(name, rule, "an adapter that is disabled and still merged", "call model.unmerge_adapter() first")
        return None
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear):
        refuse(name, rule, f"PEFT's {type(layer).__module__}.{type(layer).__name__}", "merge or disable the adapter")
    active = [key for key in layer.active_adapters if key in layer.lora_A]
    if not active:
        return None
    if len(active) > 1:
        refuse(name, rule, f"{len(active)} active adapters, {active}", "activate one with set_adapter, or merge them")
    key = active[0]
    variant = layer.lora_variant.get(key)
    if variant is not None or layer.use_dora.get(key):
        came = "DoRA" if layer.use_dora.get(key) else f"the variant {type(variant).__name__}"
        refuse(name, rule, f"{came} in adapter {key!r}", "merge the adapter, or leave lm_head out of its targets")
    a, b, dropout = layer.lora_A[key], layer.lora_B[key], layer.lora_dropout[key]
    if b.bias is not None:
        refuse(name, rule, f"lora_bias in adapter {key!r}", "set lora_bias=False or merge the adapter")
    if dropout.training and getattr(dropout, "p", 0.0) > 0:
        remedy = "set lora_dropout=0 or leave lm_head out of the adapter's targets: the head has no dropout"
        refuse(name, rule, f"lora_dropout = {dropout.p} while training in adapter {key!r}", remedy)
    return AdapterParts(check_held("lora_A", a.weight, name, 2), check_held("lora_B", b.weight, name, 2), layer.scaling[key])
