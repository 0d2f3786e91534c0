"""A sharded head of 151,936 tokens: a rank holds no logits of all rows, and half of the head's gradient."""

import pytest
from sharded_memory import VOCAB, WIDTH, WORKSPACE, N
from two_ranks import start

from topd.memory import MIB, settled_mib

LOGITS_MIB = 4 * N * VOCAB / MIB / 2  # of one model, on one of two ranks
WEIGHT_MIB = 4 * VOCAB * WIDTH / MIB  # of one process
SLACK_MIB = 64  # what the matrix products keep, as in the benchmark of memory


@pytest.mark.skipif(settled_mib() is None, reason="the system does not tell a process's peak memory")
def test_the_peak_of_a_rank(tmp_path):
    budget = WEIGHT_MIB / 2 + WORKSPACE / MIB + SLACK_MIB
    assert budget < LOGITS_MIB
    for rank in start("losses/sharded_memory.py", tmp_path, timeout=120):
        assert rank["rows"] == VOCAB // 2
        assert rank["peak_mib"] < budget
