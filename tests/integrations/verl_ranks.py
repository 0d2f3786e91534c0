"""The forward that topd gives verl's students under FSDP and FSDP2, as verl wraps them, on two ranks; see test_verl.py."""

from types import MethodType

import torch
import verl_cases
import verl_stubs
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from two_ranks import fork

import topd
from topd.integrations.verl import forward_with_topd, rows_of


def fsdp(model):
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def gradients(model):
    """Return the whole gradient of each parameter by its name in the model without wrappers."""
    if not isinstance(model, FullyShardedDataParallel):
        return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return {name.replace("_fsdp_wrapped_module.", ""): one.grad.clone() for name, one in model.named_parameters()}


def step(wrapped):
    """Return the summed losses of a micro-batch, and the gradients: the means over ranks that have the same batch."""
    model, batch = verl_cases.student(), verl_cases.batch() | verl_cases.FLAGS
    model.forward = MethodType(forward_with_topd, model)
    sharded = wrapped(model)
    rows = rows_of(batch, verl_cases.teacher_head(), topd.ReverseKL(), ulysses=False)
    inputs, _ = verl_stubs.FSDPEngineWithLMHead().prepare_model_inputs(batch)
    loss = sharded(**inputs, use_cache=False, topd_rows=rows).fused_linear_aux.distillation_losses.sum()
    loss.backward()
    return {"loss": loss.detach(), "grads": gradients(sharded)}


def work(rank):
    torch.distributed.init_process_group("gloo")
    verl_stubs.install()
    return {each.__name__: step(each) for each in (fsdp, fsdp2)}


if __name__ == "__main__":
    fork(work)
