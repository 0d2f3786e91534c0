"""Two processes that run the page on several devices; started by test_distributed_page.py as a process of its own."""

from house.pages import DOCS, run_page
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: F401
from two_ranks import fork

import topd  # noqa: F401


def work(rank: int) -> dict[str, float]:
    names = run_page(DOCS / "distributed.md")
    return {"error": names["error"].item()}


if __name__ == "__main__":
    fork(work)
