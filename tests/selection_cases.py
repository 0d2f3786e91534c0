"""Scores, masks and candidates that the tests of TOPD's selection share."""

import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCORE = [[5.0, 1.0, 4.0, 2.0, 3.0], [0.0, 7.0, 7.0, -1.0, 6.0]]
MASK = [[False, True, True, True, True], [True, True, True, False, False]]


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_batch(columns: int = 23):
    """Return scores with many ties; ragged responses behind prompts, holes in some, one empty, one of a single token."""
    score = torch.randint(-8, 9, (6, columns)).double() / 4
    mask = torch.rand(6, columns) < torch.tensor([1.0, 0.5, 0.8, 0.8, 0.3, 1.0]).unsqueeze(1)
    mask[1] = False
    mask[2] = torch.arange(columns) == 7
    mask[3, :9] = False
    mask[5, 15:] = False
    return score, mask


POSITIONS = [[0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]
DIVERGENT = [False, False, True, False, True]
