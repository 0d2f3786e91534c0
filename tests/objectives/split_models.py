"""Two processes that share each model's rows and heads; started by test_split_models.py as a process of its own."""

import torch
from objective_cases import batch_of
from split_cases import OPD, TOPD, both, opd_of, split, steps_with_topk, three_steps, topd_steps
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from two_ranks import fork, message

import topd
from topd.integrations.rollouts import pack_rollouts

POSITIONS = torch.tensor([[0, 12], [1, 6], [2, 10], [0, 15]])
WINDOWS = ("opd", "unequal", "generated")
NOISES = {
    "independent": {},
    "shared": {"window_noise": "shared"},
    "counterfactual": {"window_noise": "counterfactual", "student_window": "rollout"},
}


def sampled(student, teacher, seed):
    """Both models' windows, by every noise."""
    batch, tokens = batch_of(), {}
    for name, noise in NOISES.items():
        generator = torch.Generator().manual_seed(seed)
        windows = topd.sample_windows(
            student, teacher, batch["input_ids"], batch["attention_mask"], POSITIONS, horizon=5, generator=generator, **noise
        )
        tokens[name] = torch.stack([windows.student_tokens, windows.teacher_tokens])
    return tokens


def under_context_parallel(mesh):
    student, teacher = both("opd")
    batch = batch_of()
    rollouts = student, teacher, batch["input_ids"], batch["attention_mask"]
    windows, packed = topd.sample_windows(*rollouts, POSITIONS, horizon=2), pack_rollouts(batch)
    calls = {
        "topd": lambda: topd.TOPD(student, teacher)(batch),
        "sample_windows": lambda: topd.sample_windows(*rollouts, POSITIONS, horizon=2),
        "window_hidden": lambda: topd.window_hidden(student, *rollouts[2:], windows),
        "packed": lambda: topd.OPD(student, teacher)(packed),
    }
    with context_parallel(mesh, buffers=[torch.zeros(1, 8)], buffer_seq_dims=[1]):
        messages = {name: message(call) for name, call in calls.items()}
    return messages | {"afterwards": message(calls["packed"])}


def refused(mesh):
    """A group that would judge the same candidates twice."""
    student, teacher = (split(model, mesh) for model in both("opd"))
    return message(lambda: topd.TOPD(student, teacher, process_group=torch.distributed.group.WORLD)(batch_of()))


def topd_of(name, mesh, rank):
    """Three steps of TOPD; the generators differ."""
    models = (split(model, mesh, embeddings=name in ("greedy", "mismatch")) for model in both("opd"))
    return topd_steps(name, *models, seed=5 + rank)


def topd_with_whole_heads(mesh):
    """Three steps where the layers alone are split; the generators are the same."""
    models = (split(model, mesh, head=False) for model in both("opd"))
    return topd_steps("sampled", *models, seed=5)


def moved(mesh):
    """Whether a teacher that is cut elsewhere travels once."""
    objective = opd_of("unequal", *(split(model, mesh) for model in both("unequal")))
    heads = []
    for _ in range(2):
        objective(batch_of())
        heads.append(objective._aligned._head)
    return heads[0] is heads[1] is not None


def work(rank):
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    results = {}
    for name in OPD:
        models = (split(model, mesh, embeddings=name == "jsd") for model in both(name))
        results[name] = three_steps(opd_of(name, *models))
    for divergence in ("forward_kl", "reverse_kl"):
        results[f"topk {divergence}"] = steps_with_topk(divergence, split(both("opd")[0], mesh))
    results["moved"] = moved(mesh)
    results["windows"] = {name: sampled(*(split(model, mesh) for model in both(name)), seed=7 + rank) for name in WINDOWS}
    head = topd.Head.from_model(split(both("opd")[0], mesh))
    results["head"] = {"start": head.shard.start, "rows": head.weight.shape[0], "vocab": head.shard.vocab}
    results |= {
        "refused": refused(mesh),
        "topd": {name: topd_of(name, mesh, rank) for name in TOPD},
        "layers": topd_with_whole_heads(mesh),
    }
    results["context"] = under_context_parallel(mesh)
    return results


if __name__ == "__main__":
    fork(work)
