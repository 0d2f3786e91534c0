"""The page on several devices runs as printed, in two processes."""

import pytest
from two_ranks import start


def test_the_page_runs_in_two_processes(tmp_path):
    pytest.importorskip("transformers")
    first, second = start("house/two_distributed_ranks.py", tmp_path, timeout=120)
    assert first["error"] == second["error"]
    assert first["error"] > 0.1  # of full_tensor() without grad_placements
