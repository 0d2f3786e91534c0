"""A rank of a sharded head that dies: the others end at once, and name it."""

import subprocess
import time
from pathlib import Path

import pytest
from two_ranks import start


def test_a_rank_that_dies_ends_the_others_with_its_name(tmp_path, capsys):
    with pytest.raises(subprocess.CalledProcessError):
        start("losses/lost_rank.py", tmp_path, timeout=60, ranks=3)
    said = [line for line in capsys.readouterr().out.splitlines() if " says: " in line]
    assert sorted(line[:6] for line in said) == ["rank 0", "rank 2"]
    assert all("lost the connection to rank" in line and "Start all ranks again" in line for line in said)
    assert any("to rank 1: the process died" in line for line in said)
    assert all("1" in line.partition("lost the connection to rank")[2].partition(":")[0] for line in said)


def test_ranks_that_hang_are_ended_at_the_limit(tmp_path):
    """One never comes, and the others wait for it: the tests end all of them."""
    with pytest.raises(subprocess.TimeoutExpired):
        start("losses/hung_ranks.py", tmp_path, timeout=6)
    processes = [Path("/proc", file.read_text(), "status") for file in tmp_path.glob("*.pid")]
    assert len(processes) == 2
    ends = time.monotonic() + 10
    while any(path.exists() and "(zombie)" not in path.read_text() for path in processes):
        assert time.monotonic() < ends
        time.sleep(0.05)
