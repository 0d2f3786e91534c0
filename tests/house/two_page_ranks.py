"""Two processes that run the page of several processes; started by test_how_to.py as a process of its own."""

import accelerate
import torch
import torch.distributed.fsdp
from house.pages import DOCS, run_page
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: F401
from two_ranks import fork

import topd  # noqa: F401


def work(rank: int) -> dict[str, torch.Tensor]:
    assert accelerate.__version__
    names = run_page(DOCS / "how-to" / "several-processes.md")
    return {"gradient": torch.cat([weight.grad.flatten() for weight in names["student"].parameters()])}


if __name__ == "__main__":
    fork(work)
