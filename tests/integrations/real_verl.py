"""The installed verl with topd's engine and loss: a student under FSDP2 on CPU ranks, from the packed batch to verl's own total
loss; started by test_verl.py. verl has no engine for CPUs: its methods run on an engine that is not built."""

from types import MethodType, SimpleNamespace

import torch
import verl_cases
from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from two_ranks import fork
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers.engine import EngineRegistry

from topd.integrations.verl import forward_with_topd, register


def sharded_student(dtype):
    """Return the student as verl wraps it: each layer, then the root with the head; the forward is topd's."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=True)
    model = verl_cases.student()
    model.forward = MethodType(forward_with_topd, model)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def batch():
    data = TensorDict(verl_cases.batch(), batch_size=[])
    numbers = {"dp_size": 1, "batch_num_tokens": sum(verl_cases.RESPONSES), "global_batch_size": len(verl_cases.RESPONSES)}
    tensordict_utils.assign_non_tensor(data, pad_mode=DatasetPadMode.NO_PADDING, **verl_cases.FLAGS, **numbers)
    return data


def step(name, dtype):
    """Return verl's total loss, its metrics and the gradients of one micro-batch."""
    engine = object.__new__(EngineRegistry._engines["language_model"]["fsdp2"]["cuda", name])
    engine.use_ulysses_sp, engine.pad_to_length = False, None
    engine._get_packed_pad_size = lambda _: 0
    model, data = sharded_student(dtype), batch()
    assert isinstance(model, FSDPModule)
    model_inputs, output_args = engine.prepare_model_inputs(data)
    output = model(**model_inputs, use_cache=False)
    model_output = engine.prepare_model_outputs(output, output_args, data, None)
    config = SimpleNamespace(loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    settings = verl_cases.distillation_config(loss_mode=name)
    loss, metrics = distillation_ppo_loss(config, settings, model_output, data)
    loss.backward()
    grads = {each: parameter.grad.full_tensor() for each, parameter in model.named_parameters()}
    return {"loss": float(loss), "metrics": sorted(metrics), "grads": grads}


def registered(name, **options):
    """Register a loss and an engine under a vendor of that name, so that two stand side by side."""
    import verl.utils.device

    verl.utils.device.get_vendor = lambda: name
    register(name, **options)


def work(rank):
    torch.distributed.init_process_group("gloo")
    registered("topk")
    registered("hidden", teacher=verl_cases.teacher_head)
    names = ("topk", "hidden")
    half = {f"{name}, bfloat16": step(name, torch.bfloat16) for name in names}
    return {name: step(name, torch.float32) for name in names} | half


if __name__ == "__main__":
    fork(work)
