"""Models of one process, and the same split over the ranks of a mesh; three steps of an objective."""

import torch
from objective_cases import MILD, batch_of
from tiny_models import tiny
from topd_cases import FEW, GREEDY
from topk_teacher_cases import with_topk
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import topd

SMALL = MILD | {"num_hidden_layers": 2}  # what is split takes long
COLWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWWISE = ("self_attn.o_proj", "mlp.down_proj")
OPD = {
    "opd": topd.OPDConfig(),
    "jsd": topd.OPDConfig("jsd", 0.7, "sequence"),
    "hard": topd.OPDConfig("forward_kl", hard_weight=0.5, position_clip=None),
    "unequal": topd.OPDConfig(),
    "measured": topd.OPDConfig(epistemic_ids=(3, 17, 40), teacher_top2=True, top_k=5),
}
# Gates, sampled windows, embeddings of either side, noise, costs.
TOPD = {
    "greedy": {**GREEDY, "false_alarms": "cap"},
    "sampled": {"guidance_reduction": "tokens", "gate": "mean_plus_std"},
    "counterfactual": {"window_noise": "counterfactual", "student_window": "rollout", "embedding": "teacher"},
    "hidden": {**GREEDY, "embedding": "student_hidden", "gate": "running_quantile"},
    "mismatch": {**GREEDY, "cost": "mismatch", "solver": "exact"},
}


def both(name):
    """Return student and teacher in float64; of "unequal" the teacher has more tokens, and is cut elsewhere; of
    "generated" the student cannot branch."""
    student, teacher = tiny("llama", **SMALL), tiny("qwen3", seed=3, **SMALL)
    if name == "generated":
        student = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, **SMALL)
    if name == "unequal":
        teacher = tiny("qwen3", seed=3, vocab_size=67, **SMALL)
    return student.double(), teacher.double()


def split(model, mesh, *, head=True, layers=True, embeddings=False):
    """Return a model split over a mesh of one dimension: its head, its layers, and the embeddings where that is asked for."""
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())} if head else {}
    if embeddings:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    for number in range(len(model.model.layers) if layers else 0):
        plan |= {f"model.layers.{number}.{part}": ColwiseParallel() for part in COLWISE}
        plan |= {f"model.layers.{number}.{part}": RowwiseParallel() for part in ROWWISE}
    return parallelize_module(model, mesh, plan)


def flat(model):
    """Return all parameters, put together where they are split."""
    whole = (each.full_tensor() if hasattr(each, "full_tensor") else each for each in model.parameters())
    return torch.cat([each.detach().reshape(-1) for each in whole])


def three_steps(objective, *, generator=None, batch=None):
    """Take three steps of SGD on a batch, None: `batch_of()`; return the losses and the parameters."""
    batch = batch_of() if batch is None else batch
    optimizer, losses = torch.optim.SGD(objective.student.parameters(), lr=0.5), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = objective(batch, generator=generator).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "parameters": flat(objective.student)}


def topd_steps(name, student, teacher, seed):
    """Take three steps of TOPD."""
    config = topd.TOPDConfig(**FEW | TOPD[name] | {"guidance_weight": 1.0})
    return three_steps(topd.TOPD(student, teacher, config), generator=torch.Generator().manual_seed(seed))


def steps_with_topk(divergence, student):
    """Take three steps of OPD whose teacher is known by its likeliest tokens alone."""
    _, teacher = both("opd")  # whole: it stands for a server
    config = topd.OPDConfig(divergence, hard_weight=0.5)
    return three_steps(topd.OPD(student, None, config), batch=with_topk(batch_of(), teacher))


def opd_of(name, student, teacher):
    return topd.OPD(student, teacher, OPD[name], allow_unequal_vocabularies=True)
