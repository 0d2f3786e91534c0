"""Students sharded by FSDP2 in every way, a loss of theirs, and its gradients with and without sharding."""

import torch
from tiny_models import tiny
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from trainer_cases import MILD, four_rollouts

import topd
from topd.integrations.distributed import inside

# Where the head is: in the root's unit; in one unit with the last norm; in its own; in a root that frees it after its forward.
PLACES = ("root", "norm and head", "own unit", "freed root")
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# One factor for all rows, and factors that no hint announced: then the backward pass computes rows again.
UPSTREAMS = ("even", "uneven")


def models(dtype=torch.float32):
    """Return a student and a teacher."""
    return tiny("llama", **MILD).to(dtype), tiny("qwen3", seed=3, **MILD).to(dtype).requires_grad_(False)


def models_of_characters():
    """Return a student and a teacher whose tokens are characters, and which end their answers by some of them."""
    sizes = {"vocab_size": 260, "max_position_embeddings": 2048, **MILD}
    student, teacher = tiny("llama", **sizes), tiny("qwen3", seed=3, **sizes).requires_grad_(False)
    student.generation_config.eos_token_id = teacher.generation_config.eos_token_id = [16, 78]
    return student, teacher


def sharded(model, place="root", mesh=None, **options):
    """Return the model, sharded in place."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    if place == "norm and head":
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, **options)
    if place == "own unit":
        fully_shard(model.lm_head, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True if place == "freed root" else None, **options)


def micro_batches(rank=None):
    """Return the two micro-batches of one of two ranks, or of both, a rollout each."""
    rows = range(4) if rank is None else (2 * rank, 2 * rank + 1)
    return [{key: value[row : row + 1] for key, value in four_rollouts().items()} for row in rows]


def token_loss(student, teacher, batch, upstream):
    """Return a weighted sum of the divergences of the response tokens, computed by the primitives."""
    states = topd.hidden_states(student, batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        other, head = topd.hidden_states(teacher, batch["input_ids"], batch["attention_mask"])
    value = topd.linear_divergence(*states, other, head.detach(), mask=topd.next_token_mask(batch["response_mask"]))
    weights = torch.linspace(1, 3, value.shape[1]) if upstream == "uneven" else torch.ones(value.shape[1])
    return (value * weights).sum()


def whole(gradient):
    """Return a gradient as one tensor, in float32 where it has fewer bits."""
    gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def gradients(student):
    return {name: whole(parameter.grad) for name, parameter in student.named_parameters()}


def accumulated(student, teacher, rank, upstream="even", loss=token_loss):
    """Return the gradients of a rank's two micro-batches, which are exchanged once."""
    for index, batch in enumerate(micro_batches(rank)):
        student.set_requires_gradient_sync(index == 1)
        inside(student, lambda given: loss(student, teacher, given, upstream), batch).backward()
    return gradients(student)


def in_one_process(bf16=False, upstream="even", loss=token_loss, dtype=torch.float32):
    """Return the mean over two ranks of the gradients of their micro-batches, one after the other and without a wrapper; those
    of bfloat16 are added up in float32, as BF16 says."""
    student, teacher = models(dtype)
    if bf16:
        for parameter in student.parameters():  # buffers stay, as they do under FSDP2
            parameter.data = parameter.data.bfloat16()
    total = {}
    for batch in micro_batches():
        loss(student, teacher, batch, upstream).backward()
        for name, gradient in gradients(student).items():
            total[name] = total.get(name, 0) + gradient / 2
        student.zero_grad()
    return total


class Small(torch.nn.Module):
    """A model of one's own, whose forward ends before its head."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = torch.nn.Linear(12, 12), torch.nn.RMSNorm(12), torch.nn.Linear(12, 37, bias=False)

    def forward(self, states):
        return self.norm(self.layer(states).tanh())


def small():
    """Return such a model, and the weight of a teacher's head."""
    torch.manual_seed(0)
    return Small(), torch.randn(37, 12)


def small_batches(rank=None):
    """Return the two micro-batches of a rank, or all four: states [6, 12]."""
    batches = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(1)).unbind(0)
    return batches if rank is None else batches[2 * rank : 2 * rank + 2]


def small_loss(hidden, student, states, teacher):
    """Return the loss of states that the student's forward returned; its rows weigh unequally, so that they are redone."""
    value = topd.linear_divergence(hidden, topd.Head(student.head.weight), states, topd.Head(teacher))
    return (value * torch.linspace(1, 3, len(value))).sum()
