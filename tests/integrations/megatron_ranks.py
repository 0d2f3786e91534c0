"""Megatron's output processor on several ranks, with and without sequence parallelism; started by test_megatron.py."""

import megatron_stubs
import torch
from two_ranks import fork

import topd

S, B, H, V, PADDED, H_T = 6, 2, 5, 37, 40, 4


def problem():
    """Return states [s, b, ...] and whole weights [padded, ...] of both models, labels and the mask [b, s]; the same on every
    rank."""
    torch.manual_seed(3)
    shapes = {"hidden": (S, B, H), "weight": (PADDED, H), "teacher_hidden": (S, B, H_T), "teacher_weight": (PADDED, H_T)}
    named = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    mask = torch.ones(B, S)
    mask[0, 1], mask[1, 4:] = 0.0, 0.0
    return named | {"labels": torch.randint(V, (B, S)), "mask": mask}


def part(tensor, rank, ranks):
    """Return a rank's rows of a tensor that is cut evenly."""
    rows = tensor.shape[0] // ranks
    return tensor[rank * rows : (rank + 1) * rows].clone()


def losses(rank, *, sequence, teacher_cut):
    """Return a rank's losses and gradients of a call through GPTModel's forward."""
    from topd.integrations.megatron import DistillationContext, output_head, output_processor

    group, ranks, given = torch.distributed.group.WORLD, torch.distributed.get_world_size(), problem()
    layer = megatron_stubs.ColumnParallelLinear(part(given["weight"], rank, ranks), group, sequence)
    model = megatron_stubs.GPTModel(layer, factor=1.5)
    hidden = (part(given["hidden"], rank, ranks) if sequence else given["hidden"]).requires_grad_()
    first, stop = [(0, 11), (11, PADDED)][rank] if teacher_cut else (rank * PADDED // ranks, (rank + 1) * PADDED // ranks)
    teacher = topd.Head(given["teacher_weight"][first:stop].clone(), shard=topd.VocabShard(group, first, V))
    if teacher_cut:
        teacher = teacher.resharded(like=output_head(layer, vocab=V))
    teacher_hidden = part(given["teacher_hidden"], rank, ranks) if sequence and not teacher_cut else given["teacher_hidden"]
    context = DistillationContext(teacher_hidden, teacher, vocab=V, hard_weight=0.3)
    calls = {"output_processor": output_processor, "output_processor_context": context}
    value = model(None, None, None, hidden, given["labels"], loss_mask=given["mask"], **calls)
    (value * given["mask"] / 7).sum().backward()
    return {"value": value.detach(), "hidden": hidden.grad, "weight": layer.weight.grad}


def work(rank):
    torch.distributed.init_process_group("gloo")
    megatron_stubs.install()
    return {
        "plain": losses(rank, sequence=False, teacher_cut=False),
        "teacher cut elsewhere": losses(rank, sequence=False, teacher_cut=True),
        "sequence": losses(rank, sequence=True, teacher_cut=False),
        "sequence, all of the teacher's rows": losses(rank, sequence=True, teacher_cut=True),
    }


if __name__ == "__main__":
    fork(work)
