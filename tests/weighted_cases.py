"""Weighted rows of a table, chosen by ids: random ids, and the dense matrix of weights."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_ids(n: int, m: int, vocab: int) -> Tensor:
    """Return ids [n, m] with repeats, of which some lie outside the vocabulary."""
    ids = torch.randint(-2, vocab + 3, (n, m))
    ids[:, m // 2 :] = ids[:, : m - m // 2]
    return ids


def dense(ids: Tensor, weights: Tensor, vocab: int) -> Tensor:
    """Return [N, V] float64, the weight of each entry of the table, those outside it left out."""
    inside = (ids >= 0) & (ids < vocab)
    out = torch.zeros(ids.shape[0], vocab, dtype=torch.float64)
    return out.scatter_add(-1, ids.clamp(0, vocab - 1), weights.double().masked_fill(~inside, 0.0))
