"""topd.OPSD in two processes: the steps of one, and the same average in both without a word between them."""

import pytest
from compare import assert_near
from pair_cases import batch_of
from two_ranks import start
from two_self_teachers import CASES, after_two_steps


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    ranks = start("objectives/two_self_teachers.py", tmp_path, timeout=180)
    for build, kind in CASES:
        expected = after_two_steps(build, kind, batch_of())
        for each in (rank[f"{build.__name__} {kind}"] for rank in ranks):
            assert_near(each["parameters"], expected["parameters"], 1e-10, f"{build.__name__} {kind}")
            assert each["state"].keys() == expected["state"].keys()
            for name, value in each["state"].items():
                assert_near(value, expected["state"][name], 1e-10, name)
