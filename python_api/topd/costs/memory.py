"""Peak memory of a divergence and its gradients beyond the inputs (weights, hidden states), predicted part by part.

One tile is N V numbers in float32. Counts of tiles follow the code line by line at the moment that holds most:

eager   logits in the models' dtype, widened to float32, log_softmax; both log-probabilities live until the gradients are there.
        The peak is in the divergence's backward, or in the student's matrix products where heads are wide and rows few.
TRL     its ChunkedDivergenceFunction (trl 1.16): two buffers of min(N, 4096) x 32,768 numbers, d hidden and d weight, all
        float32. Without Triton, so on a CPU, its backward has further temporaries of a buffer's size.
topd    what `topd.plan` returns.
"""

from typing import NamedTuple

from topd.losses.plan import Plan

FLOAT32 = 4
TRL_ROWS, TRL_COLUMNS = 4096, 32768
# Tiles beside both log-probabilities at the peak of eager code: saved for backward, gradients or temporaries. The peaks are in
# the backward of p_S (s - t), in the forward of p_T (t - s), in the backward of p_S in the JSD.
EAGER_TILES = {"reverse_kl": (2, 2), "forward_kl": (1, 2), "jsd": (4, 4)}
# Temporaries of TRL's _backward_tile.
TRL_TILES = {"reverse_kl": 9, "forward_kl": 9, "jsd": 10}


class Sizes(NamedTuple):
    """A call: N rows, vocabulary V, the student's width, bytes of a number of weights and hidden states, whether d weight is
    computed."""

    n: int
    vocab: int
    width: int
    itemsize: int
    weight_grad: bool

    @property
    def tile(self) -> int:
        """Return the bytes of N V numbers in float32."""
        return FLOAT32 * self.n * self.vocab

    def grads(self, itemsize: int) -> dict[str, int]:
        """Return the bytes of the gradients in numbers of so many bytes, by name."""
        weight = itemsize * self.vocab * self.width * self.weight_grad
        return {"d hidden": itemsize * self.n * self.width, "d weight": weight}


def eager_memory(sizes: Sizes, loss: str) -> dict[str, int]:
    """Return the parts that are alive at the peak of eager code, in bytes."""
    logprobs = {"log-probabilities": 2 * sizes.tile}
    narrow = sizes.n * sizes.vocab * sizes.itemsize
    saved, gradients = EAGER_TILES[loss]
    divergence = logprobs | {"saved for backward": saved * sizes.tile, "gradients": gradients * sizes.tile}
    products = logprobs | {"d logits": narrow} | sizes.grads(sizes.itemsize)
    return max(divergence, products, key=total)


def trl_memory(sizes: Sizes, loss: str, *, kernels: bool) -> dict[str, int]:
    """Return the parts that are alive at the peak of TRL's chunked loss, in bytes; `kernels`: whether Triton's are used."""
    buffer = FLOAT32 * min(sizes.n, TRL_ROWS) * TRL_COLUMNS
    wide = {f"{name} in float32": size for name, size in sizes.grads(FLOAT32).items()}
    used = buffer * min(sizes.vocab, TRL_COLUMNS) // TRL_COLUMNS
    narrow = used * sizes.itemsize // FLOAT32 if sizes.itemsize < FLOAT32 else 0
    inside = (
        {"logits": 2 * buffer, "d logits": narrow} if kernels else {"logits": 2 * buffer, "temporaries": TRL_TILES[loss] * used}
    )
    loop = inside | wide
    casts = sizes.grads(sizes.itemsize) if sizes.itemsize < FLOAT32 else {}
    end = {"logits": 2 * buffer, "d logits": narrow} | wide | casts
    return max(loop, end, key=total)


def topd_memory(plan: Plan, sizes: Sizes) -> dict[str, int]:
    """Return topd's parts at its peak, in bytes; their sum is `plan.peak_bytes`."""
    wide = {f"{name} in float32": size for name, size in sizes.grads(FLOAT32).items()}
    kept = {name: size for name, size in wide.items() if size}
    if sum(kept.values()) > plan.peak_bytes - plan.workspace_bytes:
        return {"workspace, d hidden, d weight": plan.peak_bytes}
    rest = plan.peak_bytes - plan.workspace_bytes - sum(kept.values())
    return {"workspace": plan.workspace_bytes} | kept | {"copies and rows": rest}


def total(parts: dict[str, int]) -> int:
    """Return the bytes of all parts."""
    return sum(parts.values())
