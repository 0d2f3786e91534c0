"""Two ranks of tensor parallelism, or two times two with FSDP2; started by test_tensor_parallel.py as processes of its own."""

import itertools
import os
import tempfile

import torch
import torch.distributed as dist
from fsdp2_cases import BF16, PLACES, UPSTREAMS, accumulated, gradients, micro_batches, models, sharded, token_loss
from split_cases import split
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from two_ranks import fork

import topd

DTYPES = (torch.float32, torch.float64)
BF16_PLACES = ("root", "norm and head")


def with_fsdp2(rank):
    """The gradients of two data-parallel ranks, each of two tensor-parallel ones."""
    mesh, results = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), {}
    for place, upstream, dtype in itertools.product(PLACES, UPSTREAMS, DTYPES):
        student, teacher = models(dtype)
        split(teacher, mesh["tensor"], layers=False)
        sharded(split(student, mesh["tensor"]), place, mesh["data"])
        results[place, upstream, dtype] = accumulated(student, teacher, rank // 2, upstream)
    for place, upstream in itertools.product(BF16_PLACES, UPSTREAMS):
        student, teacher = models()
        split(teacher, mesh["tensor"], layers=False)
        sharded(split(student, mesh["tensor"], layers=False), place, mesh["data"], mp_policy=BF16)
        results[place, upstream, torch.bfloat16] = accumulated(student, teacher, rank // 2, upstream)
    return {"places": results}


def alone(rank):
    """Torch's parallelize_module and transformers' tp_plan, on two ranks and without data parallelism."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    folders, results = [tempfile.mkdtemp() if rank == 0 else ""], {}
    dist.broadcast_object_list(folders)
    for dtype in DTYPES:
        student, teacher = models(dtype)
        if rank == 0:
            student.save_pretrained(folders[0])
        dist.barrier()
        split(teacher, mesh, layers=False)
        planned = AutoModelForCausalLM.from_pretrained(folders[0], tp_plan="auto", dtype=dtype)
        for way, model in {"torch": split(student, mesh), "transformers": planned}.items():
            for batch in micro_batches():
                (token_loss(model, teacher, batch, "uneven") / 2).backward()
            results[way, dtype] = gradients(model)
    head = topd.Head.from_model(student)
    place = {"start": head.shard.start, "rows": head.weight.shape[0], "vocab": head.shard.vocab}
    return {"gradients": results, "place": place}


def work(rank):
    dist.init_process_group("gloo")
    return alone(rank) if os.environ["WORLD_SIZE"] == "2" else with_fsdp2(rank)


if __name__ == "__main__":
    fork(work)
