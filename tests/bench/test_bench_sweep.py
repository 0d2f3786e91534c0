"""Slopes of made-up data, by hand, and pictures."""

import math

import pytest

from topd_bench import plots
from topd_bench.sweep import Line, lines_of, log_slope, slope, slope_rows

SIZES = (256, 512, 1024)


def time_row(peer: str, n: int, milliseconds: float, **more) -> dict:
    shape = {"n": n, "vocab": 1000, "student_width": 8}
    spread = {"median": milliseconds, "low": milliseconds / 2, "high": milliseconds * 2}
    place = {"case": "divergence", "shape": shape, "loss": "jsd", "head": "frozen", "dtype": "float32", "malloc": "default"}
    ratios = {} if peer == "floor" else {"floor": {"median": 2.0, "low": 1.5, "high": 2.5}}
    return place | {"peer": peer, "status": "measured", "note": "", "time_ms": spread, "ratios": ratios} | more


def memory_row(peer: str, n: int, mib: float, **more) -> dict:
    return time_row(peer, n, 1.0) | {"case": "memory", "beyond_mib": mib, "time_ms": None} | more


def test_the_slope_through_points_by_hand():
    """(0, 1), (1, 3), (2, 2): means 1 and 2; (-1 * -1 + 0 * 1 + 1 * 0) / 2."""
    assert slope([0, 1, 2], [1, 3, 2]) == 0.5
    assert math.isnan(slope([1, 1], [2, 3]))


def test_a_time_that_doubles_with_its_size_has_slope_1_and_a_root_one_half():
    rows = [time_row(peer, n, time) for n in SIZES for peer, time in (("ours", 3.0 * n), ("trl", 7.0 * n**0.5))]
    rows.append(time_row("trl", 2048, 1.0) | {"status": "skipped", "time_ms": None})
    lines = lines_of(rows, "tokens")
    assert [(line.peer, line.sizes) for line in lines] == [("ours", SIZES), ("trl", SIZES)]
    assert [log_slope(line) for line in lines] == [pytest.approx(1), pytest.approx(0.5)]
    header, cells = slope_rows(lines, "vocab", memory=False)
    assert header == ["loss", "head", "peer", "sizes", "slope: d log time / d log V"]
    assert cells == [["jsd", "frozen", "topd", "3", "1.000"], ["jsd", "frozen", "trl", "3", "0.500"]]


def test_memory_is_told_per_row_and_as_a_share_of_eagers():
    """eager takes 1.5 MiB a row, topd 0.015 beside 400 that stay: 1 % of eager's. Fitted to the larger half of the sizes."""
    pairs = {"eager": lambda n: 1.5 * n, "ours": lambda n: 400 + 0.015 * n}
    rows = [memory_row(peer, n, mib(n)) for n in SIZES for peer, mib in pairs.items()]
    header, cells = slope_rows(lines_of(rows, "tokens"), "tokens", memory=True)
    assert header[-2:] == ["MiB beyond gradients, per row", "share of eager's"]
    assert cells == [
        ["jsd", "frozen", "eager", "512", "2", "1.500000", "100.0%"],
        ["jsd", "frozen", "topd", "512", "2", "0.015000", "1.0%"],
    ]
    _, alone = slope_rows([Line("jsd", "frozen", "ours", SIZES, (0.5, 1.0, 1.0))], "tokens", memory=True)
    assert alone == [["jsd", "frozen", "topd", "512", "2", "0.000000", "-"]]


@pytest.mark.parametrize("sweep", ["tokens", None])
@pytest.mark.parametrize("row", [time_row, memory_row])
@pytest.mark.parametrize("ending", plots.ENDINGS)
def test_pictures_are_written_whole(tmp_path, sweep, row, ending):
    pytest.importorskip("matplotlib")
    rows = [row(peer, n, 2.0 * n) for n in SIZES for peer in ("floor", "ours", "eager", "unknown")]
    path = tmp_path / f"out{ending}"
    assert plots.draw(rows, sweep, path)
    assert path.stat().st_size > 2000
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_where_nothing_was_measured_there_is_no_picture(tmp_path):
    assert not plots.draw([time_row("ours", 1, 1.0) | {"status": "failed"}], None, tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


def test_a_sweeps_picture_has_log_axes_units_and_every_systems_name_and_slope():
    pytest.importorskip("matplotlib")
    rows = [time_row(peer, n, 2.0 * n) for n in SIZES for peer in ("floor", "ours", "trl")]
    (panel,) = plots.sweep_figure(rows, "tokens", memory=False).axes
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("tokens, N", "time, ms")
    labels = {text.get_text() for text in panel.get_legend().get_texts()}
    assert labels == {"bare products\nslope 1.00", "topd\nslope 1.00", "TRL\nslope 1.00"}
