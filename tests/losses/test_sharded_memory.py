"""A sharded head of 151,936 tokens: a rank holds no logits of all rows, and half of the head's gradient."""

import pytest
from sharded_memory import HALF, WIDTH, WORKSPACE, N
from two_ranks import start

from topd.memory import MIB, settled_mib

LOGITS_MIB = 4 * N * HALF / MIB  # of one model, on one of two ranks
GRADIENT_MIB = 4 * HALF * WIDTH / MIB


@pytest.mark.skipif(settled_mib() is None, reason="the system does not tell a process's peak memory")
def test_the_peak_of_a_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system at once
    budget = GRADIENT_MIB + WORKSPACE / MIB
    assert budget < LOGITS_MIB
    for rank in start("losses/sharded_memory.py", tmp_path, timeout=120, alone=True):
        assert rank["rows"] == HALF
        assert all(GRADIENT_MIB < peak < budget for peak in rank["peaks_mib"].values()), rank
