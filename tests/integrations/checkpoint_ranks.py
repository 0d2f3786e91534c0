"""Two ranks that read their rows of a checkpoint; started by test_head_from_checkpoint.py as a process of its own."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from checkpoint_cases import model_of
from safetensors.torch import save_file
from two_ranks import fork, message

import topd
from topd.integrations.distributed import head_from_checkpoint

STARTS, VOCAB = (0, 20), 50  # of 53 rows


def status(name):
    """Return what the kernel says about this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def memory(folder, rank):
    """Return by how many MiB the process grows where it reads 2,048 of 32,768 rows, and what these and the file have."""
    if rank == 0:
        sizes = {"vocab_size": 32_768, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1}
        transformers.LlamaConfig(**sizes, tie_word_embeddings=True).save_pretrained(folder)
        save_file({"model.embed_tokens.weight": torch.ones(32_768, 512)}, Path(folder, "model.safetensors"))
    dist.barrier()
    shard = topd.VocabShard(dist.group.WORLD, 2048 * rank, 4096)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    head = head_from_checkpoint(folder, shard)
    assert head.weight.shape == (2048, 512)
    return {
        "grown_mib": status("VmHWM") - before,
        "rows_mib": head.weight.untyped_storage().nbytes() / 2**20,
        "file_mib": Path(folder, "model.safetensors").stat().st_size / 2**20,
    }


def work(rank):
    dist.init_process_group("gloo")
    folders = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folders)
    (folder,) = folders
    if rank == 0:
        model_of("bias").save_pretrained(folder)
    dist.barrier()
    group = dist.group.WORLD
    head = head_from_checkpoint(folder, topd.VocabShard(group, STARTS[rank], VOCAB))
    results = {"weight": head.weight, "bias": head.bias, "start": head.shard.start}
    vocab = 54 if rank == 0 else VOCAB
    results["refused"] = message(lambda: head_from_checkpoint(folder, topd.VocabShard(group, STARTS[rank], vocab)))
    results["unordered"] = message(lambda: head_from_checkpoint(folder, topd.VocabShard(group, STARTS[1 - rank], VOCAB)))
    return results | memory(f"{folder}/large", rank)


if __name__ == "__main__":
    fork(work)
