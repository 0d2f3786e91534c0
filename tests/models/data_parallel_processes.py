"""Two processes that wrap a student in every way; started by test_data_parallel.py as a process of its own.

Each saves what became of its part of the batch: gradients, or the error that was raised.
"""

import torch
from loss_module import Loss
from tiny_models import flat_gradient
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainer_cases import FEW, four_rollouts, models
from two_ranks import fork

import topd
from topd.integrations.distributed import inside

TOPD = topd.TOPDConfig(window_temperature=0.0, **FEW)


class DeepSpeedEngine(torch.nn.Module):
    """Stands for DeepSpeed's, which is not installed: the names that are read."""

    def __init__(self, module):
        super().__init__()
        self.module, self.dp_world_size = module, 2


def part_of(batch, rank):
    return {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def scaled(model, rank, batch=None):
    """The gradient of the whole batch, which the wrapper averages over the processes."""
    whole = four_rollouts()
    num_items = whole["response_mask"].sum()
    (2 * model(batch or part_of(whole, rank), num_items=num_items)).backward()


def whole_gradient(student):
    for parameter in student.parameters():
        if hasattr(parameter.grad, "full_tensor"):
            parameter.grad = parameter.grad.full_tensor()
    return torch.cat([p.grad.reshape(-1) for p in student.parameters()])


def refusals_under_ddp(student, teacher, batch):
    wrapped = DistributedDataParallel(student)
    messages = {
        "ddp": message_of(lambda: topd.OPD(wrapped, teacher)(batch)),
        "ddp topd": message_of(lambda: topd.TOPD(wrapped, teacher, TOPD)(batch)),
        "ddp compiled": message_of(lambda: topd.OPD(torch.compile(wrapped), teacher)(batch)),
        "hidden_states": message_of(lambda: topd.hidden_states(wrapped, batch["input_ids"])),
        "ddp.module": message_of(lambda: topd.OPD(wrapped.module, teacher)(batch)),
    }
    objective = topd.OPD(student, teacher)
    with torch.no_grad():
        objective(batch)
    messages["ddp.module after an evaluation"] = message_of(lambda: objective(batch))
    inside = Loss(topd.OPD(student, teacher))
    DistributedDataParallel(inside)(batch)
    messages["ddp.module after a step inside"] = message_of(lambda: inside.objective(batch))
    with torch.no_grad():
        return messages, [topd.OPD(model, teacher)(batch).loss for model in (wrapped, student)]


def refusals(rank):
    batch = part_of(four_rollouts(), rank)
    student, teacher = models()
    messages, values = refusals_under_ddp(student, teacher, batch)
    messages["no ddp any more"] = message_of(lambda: topd.OPD(student, teacher)(batch))
    frozen = models()[0].requires_grad_(False)
    messages["frozen"] = message_of(lambda: topd.OPD(frozen, teacher)(batch))
    alone = DistributedDataParallel(models()[0], process_group=torch.distributed.new_subgroups(1)[0])
    messages["a group of one"] = message_of(lambda: topd.OPD(alone, teacher)(batch))
    messages["deepspeed"] = message_of(lambda: topd.OPD(DeepSpeedEngine(models()[0]), teacher)(batch))
    student = models()[0]
    for layer in student.model.layers:
        fully_shard(layer)
    model = fully_shard(Loss(topd.OPD(student, teacher)))
    messages["fsdp2"] = message_of(lambda: model.objective(batch))
    model(batch).backward()
    messages["fsdp2 after a step"] = message_of(lambda: model.objective(batch))
    model = fully_shard(Loss(topd.OPD(*models())))
    messages["fsdp2 root alone"] = message_of(lambda: model.objective(batch))
    model = Loss(topd.OPD(*models()))
    fully_shard(model.student)
    messages["fsdp2 student inside"] = message_of(lambda: fully_shard(model)(batch))
    return messages, values


def under_ddp(rank, method, config=None):
    student, teacher = models()
    scaled(DistributedDataParallel(Loss(method(student, teacher, config))), rank)
    return flat_gradient(student)


def under_ddp_with_an_empty_part(rank):
    """All rollouts in one process, none in the other."""
    student, teacher = models()
    whole = four_rollouts()
    batch = {key: value if rank == 0 else value[:0] for key, value in whole.items()}
    scaled(DistributedDataParallel(Loss(topd.OPD(student, teacher))), rank, batch)
    return flat_gradient(student)


def in_the_students_own_forward(rank):
    """An objective of the wrapped student, called where the wrapper calls the model."""
    student, teacher = models()
    wrapped = DistributedDataParallel(student)
    objective, own = topd.OPD(wrapped, teacher), student.forward

    def loss(batch, num_items):
        student.forward = own
        return objective(batch, num_items=num_items).loss

    student.forward = loss
    scaled(wrapped, rank)
    return flat_gradient(student)


def under_fsdp2(rank, method, config=None):
    student, teacher = models()
    for layer in student.model.layers:
        fully_shard(layer)
    scaled(fully_shard(Loss(method(student, teacher, config))), rank)
    return whole_gradient(student)


def through_the_trainers_wrapper(rank):
    """What accelerate makes of a model under FSDP2, in DistillationTrainer's hands: sharded in place."""
    student, teacher = models()
    for layer in student.model.layers:
        fully_shard(layer)
    fully_shard(student)
    objective = topd.OPD(student, teacher)

    def model(batch, num_items):
        return inside(student, lambda given: objective(given, num_items=num_items).loss, batch)

    scaled(model, rank)
    return whole_gradient(student)


def under_replicate(rank):
    """Torch's composable DDP, a module without a wrapper; its second step, since the first one sets it up."""
    student, teacher = models()
    model = replicate(Loss(topd.OPD(student, teacher)))
    scaled(model, rank)
    model.objective = topd.OPD(student, teacher)
    student.zero_grad()
    scaled(model, rank)
    return flat_gradient(student)


def under_fsdp1(rank):
    student, teacher = models()
    layer = type(student.model.layers[0])
    model = FullyShardedDataParallel(
        Loss(topd.OPD(student, teacher)),
        auto_wrap_policy=lambda module, recurse, **_: recurse or isinstance(module, layer),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    batch = part_of(four_rollouts(), rank)
    message = message_of(lambda: model.module.objective(batch))
    scaled(model, rank)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return message, flat_gradient(student)


def work(rank):
    torch.distributed.init_process_group("gloo")
    messages, values = refusals(rank)
    gradients = {
        "ddp": under_ddp(rank, topd.OPD),
        "ddp with an empty part": under_ddp_with_an_empty_part(rank),
        "in the student's own forward": in_the_students_own_forward(rank),
        "fsdp2 through the trainer's wrapper": through_the_trainers_wrapper(rank),
        "replicate": under_replicate(rank),
        "fsdp2": under_fsdp2(rank, topd.OPD),
        "ddp topd": under_ddp(rank, topd.TOPD, TOPD),
        "fsdp2 topd": under_fsdp2(rank, topd.TOPD, TOPD),
    }
    messages["fsdp1"], gradients["fsdp1"] = under_fsdp1(rank)
    return {"messages": messages, "values": values, "gradients": gradients}


if __name__ == "__main__":
    fork(work)
