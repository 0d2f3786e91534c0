"""`make bench-smoke`: what counts as too much, and that one bad measurement does not fail it."""

import json

import pytest

from tools import bench_smoke

LINE = {"words": ["--case", "divergence"], "bounds": {"ours/eager": 0.5}}


def rows(ours: list[float], eager: list[float]) -> list[dict]:
    return [{"peer": peer, "status": "measured", "samples_ms": times} for peer, times in (("ours", ours), ("eager", eager))]


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """Return a list that the command takes its measurements from, one a try."""
    path, waiting, asked = tmp_path / "bounds.json", [], []
    path.write_text(json.dumps({"a line": LINE}))
    monkeypatch.setattr(bench_smoke, "BOUNDS", path)

    def measured(words):
        asked.append(words)
        return waiting.pop(0)

    monkeypatch.setattr(bench_smoke, "measured", measured)
    return waiting, asked


def test_a_ratio_is_the_median_of_the_rounds_own():
    """10 / 1, 4 / 2, 9 / 3."""
    assert bench_smoke.value_of(rows([10.0, 4.0, 9.0], [1.0, 2.0, 3.0]), "ours/eager") == 3.0
    memory = [{"peer": peer, "status": "measured", "beyond_mib": mib} for peer, mib in (("ours", 1.0), ("eager", 4.0))]
    assert bench_smoke.value_of(memory, "ours/eager") == 0.25


def test_up_to_twice_the_bound_is_enough(answers, capsys):
    waiting, asked = answers
    waiting.append(rows([1.0], [1.0]))
    assert bench_smoke.main() == 0
    assert asked == [["--case", "divergence", "--rounds", "3"]]
    assert "| a line | ours/eager | 1.000    | 0.5   | 1" in capsys.readouterr().out


def test_one_bad_measurement_is_repeated_with_more_rounds(answers):
    waiting, asked = answers
    waiting += [rows([3.0], [1.0]), rows([0.4], [1.0])]
    assert bench_smoke.main() == 0
    assert [words[-1] for words in asked] == ["3", "9"]


@pytest.mark.parametrize("bad", [rows([1.1], [1.0]), rows([0.4], [1.0])[:1]])
def test_what_stays_beyond_twice_the_bound_or_is_not_measured_fails(answers, bad, capsys):
    waiting, asked = answers
    waiting += [bad] * 3
    assert bench_smoke.main() == 1
    assert len(asked) == 3
    assert "TOO MUCH" in capsys.readouterr().out


def test_the_committed_bounds_are_words_that_topd_bench_knows():
    from topd.cli.main import parser

    for line in json.loads(bench_smoke.BOUNDS.read_text()).values():
        arguments = parser().parse_args(["bench", *line["words"]])
        assert set(arguments.peers) == {"ours", "eager"}
        assert all(0 < bound < 4 for bound in line["bounds"].values())
