"""Areas, intervals and ranks, by hand."""

import math

import pytest

from quality.statistics import area, paired_interval, rank_auc


def test_an_area_is_the_mean_height():
    assert area([0, 5, 10], [0.0, 1.0, 1.0], 10) == pytest.approx(0.75)
    assert area([0, 5, 10], [0.0, 1.0, 1.0], 5) == pytest.approx(0.5)
    assert area([0, 5, 10], [0.0, 1.0, 0.0], 7.5) == pytest.approx((2.5 + 1.875) / 7.5)
    for end in (0, 11):
        with pytest.raises(ValueError, match="end must lie beyond 0 and at most at 10"):
            area([0, 5, 10], [0.0, 1.0, 1.0], end)


def test_an_interval_of_equal_differences_is_a_point():
    assert paired_interval([0.25] * 8) == (0.25, 0.25, 0.25)


def test_an_interval_covers_its_mean_and_repeats():
    values = [0.1, -0.05, 0.2, 0.12, 0.0, 0.07, 0.15, -0.02]
    mean, low, high = paired_interval(values)
    assert mean == pytest.approx(sum(values) / 8)
    assert low < mean < high
    assert (mean, low, high) == paired_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * 0.0812 / 8**0.5, rel=0.15)  # the standard error by hand


def test_one_seed_has_no_interval():
    mean, low, high = paired_interval([0.3])
    assert mean == 0.3
    assert math.isnan(low)
    assert math.isnan(high)


def test_rank_auc_by_hand():
    assert rank_auc([2.0, 3.0], [1.0, 0.0]) == 1.0
    assert rank_auc([1.0], [1.0]) == 0.5
    assert rank_auc([0.0, 2.0], [1.0, 1.0]) == 0.5
    assert rank_auc([1.0, 2.0], [1.0, 0.0, 5.0]) == pytest.approx((1.5 + 2) / 6)
    assert rank_auc([], [1.0]) is None
