"""Areas under curves, paired bootstrap intervals, and how well a number tells two groups apart."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

REPEATS = 10_000


def area(places: Sequence[float], values: Sequence[float], end: float) -> float:
    """Return the mean height of a curve from its first place to `end`, straight between its points (trapezoids).

    Args:
        places, values: the curve's points, places rising.
        end: beyond the first place, at most the last one.
    """
    if not places[0] < end <= places[-1]:
        raise ValueError(f"end must lie beyond {places[0]} and at most at {places[-1]}, got {end}")
    inner = [(place, value) for place, value in zip(places, values, strict=True) if place < end]
    points = [*inner, (end, float(np.interp(end, places, values)))]
    pairs = itertools.pairwise(points)
    return sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairs) / (end - places[0])


def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of paired differences and its bootstrap interval, percentiles of means over resampled seeds; NaN for
    fewer than two."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return (float(values.mean()) if len(values) else math.nan), math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(values), size=(REPEATS, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def rank_auc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """Return the probability that a positive's number is the larger one, a tie counted half; None where a group is empty."""
    if not positives or not negatives:
        return None
    ordered = np.sort(np.asarray(negatives, dtype=float))
    above = np.searchsorted(ordered, positives, side="left") + np.searchsorted(ordered, positives, side="right")
    return float(above.mean() / 2 / len(ordered))
