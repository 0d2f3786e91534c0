"""A step of topd.TOPD with few candidates."""

import torch
from tiny_models import VOCAB

import topd

FOURTHS = list(range(0, VOCAB, 4))  # as end tokens: a window soon comes to one
FEW = {"candidates": "top_k", "candidate_value": 3, "horizon": 6}
GREEDY = {"window_temperature": 0.0}


def step(student, teacher, batch, **options):
    generator = torch.Generator().manual_seed(5)
    return topd.TOPD(student, teacher, topd.TOPDConfig(**(FEW | options)))(batch, generator=generator)


def assert_end_at_fourths(windows):
    """Both models' windows, of 6 tokens at most, end at the first of FOURTHS and nowhere else, and some do."""
    for tokens, lengths in (
        (windows.student_tokens, windows.student_lengths),
        (windows.teacher_tokens, windows.teacher_lengths),
    ):
        assert lengths.min() < 6
        for window, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
            assert all(token % 4 for token in window[: length - 1])
            assert length == 6 or window[length - 1] % 4 == 0
