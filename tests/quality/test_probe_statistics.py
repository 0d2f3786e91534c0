"""quality.probe_statistics: areas by hand, intervals over trajectories, what an arm says."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from quality.probe_distances import Points
from quality.probe_statistics import RESAMPLES, Interval, aucs, interval, repeats, resampling, stays_out, summary


def points_of(high, random, low, *, again=None):
    """Return points of one class after the other; point i of each class is of trajectory i."""
    distance = np.concatenate([high, random, low]).astype(float)
    count = [len(high), len(random), len(low)]
    return Points(
        label=np.repeat([0, 1, 2], count),
        trajectory=np.concatenate([np.arange(each) for each in count]),
        loss=np.repeat([3.0, 1.0, 0.1], count),
        distance={"arm": np.stack([0 * distance, distance], axis=1)},
        later={},
        again={"arm": np.stack([high, high if again is None else again], axis=1)},
    )


def test_areas_by_hand():
    points = points_of([0.5, 0.2], [0.2, 0.1], [0.6, 0.5])
    once = np.ones((1, 2))
    distance = points.distance["arm"][:, 1]
    assert aucs(points, distance, "random", once).tolist() == [(1 + 1 + 0.5 + 1) / 4]
    assert aucs(points, distance, "low", once).tolist() == [0.5 / 4]
    twice = np.array([[2.0, 0.0], [0.0, 2.0]])  # the points of one trajectory alone
    assert aucs(points, distance, "random", twice).tolist() == [1.0, 1.0]
    assert aucs(points, distance, "low", twice).tolist() == [0.0, 0.0]


def test_an_area_is_the_rank_sums():
    rng = np.random.default_rng(0)
    high, random, low = (rng.integers(0, 9, size=(40,)) / 8 + shift for shift in (0.25, 0.125, 0.0))
    points = points_of(high, random, low)
    area = aucs(points, points.distance["arm"][:, 1], "low", np.ones((1, 40)))[0]
    assert area == pytest.approx(stats.mannwhitneyu(high, low).statistic / 1600)


def test_trajectories_are_drawn_with_all_their_points():
    weights = resampling(points_of([1.0] * 5, [1.0] * 5, [1.0] * 5))
    assert weights.shape == (RESAMPLES + 1, 5)
    assert weights[0].tolist() == [1.0] * 5
    assert (weights.sum(1) == 5).all()
    assert weights[1:].std(0).min() > 0.8
    assert np.array_equal(weights, resampling(points_of([1.0] * 5, [1.0] * 5, [1.0] * 5)))


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Normal distances a shift apart, two points of a class in each of 40 trajectories, which share a shift of their own."""
    rng, inside = np.random.default_rng(1), 0
    truth = stats.norm.cdf(0.5 / math.sqrt(2 * 2))
    for _ in range(60):
        own = rng.normal(size=40)
        twice = [np.concatenate([own + rng.normal(size=40) + shift for _ in range(2)]) for shift in (0.5, 0.0, 0.0)]
        points = dataclasses.replace(points_of(*twice), trajectory=np.tile(np.arange(40), 6))
        bounds = interval(aucs(points, points.distance["arm"][:, 1], "random", resampling(points)))
        inside += bounds.low <= truth <= bounds.high
    assert inside >= 52


def test_what_an_arm_says():
    points = points_of([0.5, 0.7, 0.0, 0.9], [0.3, 0.3, 0.2, 0.4], [0.0, 0.1, 0.2, 0.6])
    one = summary(points, "arm", "arm", resampling(points))
    assert one.medians == {"high": 0.6, "random": 0.3, "low": pytest.approx(0.15)}
    assert one.under == 0.25  # 0.0 under 0.3
    assert one.zero == 2 / 12
    assert one.against["random"].value == 12 / 16
    assert one.ahead["low"] == Interval(0.0, 0.0, 0.0)
    distance = points.distance["arm"][:, 1]
    assert one.pearson == pytest.approx(np.corrcoef(points.loss, distance)[0, 1])
    assert one.spearman == pytest.approx(stats.spearmanr(points.loss, distance).statistic)
    assert str(Interval(0.551, 0.4, 0.7)) == "0.55 [0.40, 0.70]"


def test_distances_that_are_all_equal_say_nothing():
    points = points_of([0.0] * 3, [0.0] * 3, [0.0] * 3)
    one = summary(points, "arm", "arm", resampling(points))
    assert one.against["random"] == Interval(0.5, 0.5, 0.5)
    assert math.isnan(one.pearson)
    assert one.zero == 1


def test_a_distance_that_repeats_is_told_from_one_that_does_not():
    high = [0.1, 0.5, 0.2, 0.9, 0.4, 0.3, 0.8, 0.7, 0.6, 1.0]
    again = [0.2, 0.1, 0.5, 0.9, 0.3, 0.4, 0.7, 0.8, 0.6, 0.7]
    weights = np.ones((1, 10))
    weights = np.concatenate([weights, np.eye(1, 10), [[2.0] * 5 + [0.0] * 5]])
    points = points_of(high, [0.0] * 10, [0.0] * 10, again=again)
    values = repeats(points, "arm", 1, weights)
    assert values[0] == pytest.approx(stats.spearmanr(high, again).statistic)
    assert np.isnan(values[1])  # one trajectory alone
    ranks = stats.rankdata(high)[:5], stats.rankdata(again)[:5]
    assert values[2] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert stays_out(points, "arm", 1) == 1 / 3  # {0, 2, 5}, then {1, 0, 4}
    same = points_of(high, [0.0] * 10, [0.0] * 10)
    assert repeats(same, "arm", 1, weights)[0] == pytest.approx(1.0)
    assert stays_out(same, "arm", 1) == 1.0
    flat = points_of([0.5] * 10, [0.0] * 10, [0.0] * 10)
    assert math.isnan(interval(repeats(flat, "arm", 1, weights)).value)
