"""A rank of a sharded head that dies: the others end at once, and name it."""

import subprocess

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
