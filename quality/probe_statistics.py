"""What a probe's points say: medians, correlations, and how well a distance tells two classes of tokens apart."""

from dataclasses import dataclass

import numpy as np

from quality.probe_distances import Array, Points
from quality.probe_points import CLASSES

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value with the bounds that hold 95 % of its resamples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def resampling(points: Points, seed: int = 0) -> Array:
    """Return how often each trajectory counts, [RESAMPLES + 1, trajectories]: once in the first row, drawn with replacement in
    the others. Trajectories are drawn and not points, since the points of one are alike."""
    count = int(points.trajectory.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.concatenate([np.ones((1, count)), drawn])


def aucs(points: Points, distance: Array, other: str, weights: Array) -> Array:
    """Return the area under the ROC curve of a distance [n] between high-loss tokens and another class for each row of weights:
    how probable it is that a high-loss token is further than one of the other; equal distances count one half."""
    first, second = points.of_class("high"), points.of_class(other)
    difference = distance[first, None] - distance[None, second]
    ahead = (difference > 0) + 0.5 * (difference == 0)
    ours, others = weights[:, points.trajectory[first]], weights[:, points.trajectory[second]]
    total = ours.sum(1) * others.sum(1)
    return np.asarray(((ours @ ahead) * others).sum(1) / np.where(total > 0, total, np.nan))


def repeats(points: Points, arm: str, place: int, weights: Array) -> Array:
    """Return the rank correlation of a distance with the same drawn once more, at high-loss tokens, for each row of weights:
    1 where a distance is the point's own, 0 where it is the draw's. NaN where a distance is constant. place: of the horizon."""
    from scipy import stats

    high = points.of_class("high")
    ranks = [stats.rankdata(values) for values in (points.distance[arm][high, place], points.again[arm][:, place])]
    drawn = weights[:, points.trajectory[high]]
    total = drawn.sum(1)
    total = np.where(total > 0, total, np.nan)
    first, second = (values - (drawn @ values / total)[:, None] for values in ranks)
    covariance, *variances = (
        (drawn * one * other).sum(1) for one, other in ((first, second), (first, first), (second, second))
    )
    scale = np.sqrt(variances[0] * variances[1])
    return np.asarray(covariance / np.where(scale > 0, scale, np.nan))


def stays_out(points: Points, arm: str, place: int, fraction: float = 0.3) -> float:
    """Return the share of the high-loss tokens with the lowest distances, which the gate lets out, that it lets out again where
    their windows are drawn once more; a gate that threw dice would keep `fraction`."""
    high = points.of_class("high")
    count = int(fraction * int(high.sum()))
    both = points.distance[arm][high, place], points.again[arm][:, place]
    first, second = (set(np.argsort(values, kind="stable")[:count]) for values in both)
    return len(first & second) / count if count else float("nan")


def interval(values: Array) -> Interval:
    """Return the first value with the bounds of the others."""
    if np.isnan(values[0]):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return Interval(float(values[0]), float(low), float(high))


@dataclass(frozen=True)
class Summary:
    """What one arm says.

    Attributes:
        medians: of the distance, in each class.
        under: the share of high-loss tokens whose distance is under the upper quartile of low-loss ones.
        pearson, spearman: of loss and distance over all points; NaN where either is constant.
        zero: the share of distances that are exactly 0.
        against: AUC of high-loss tokens against random and against low-loss ones.
        ahead: by how much either is above that of another arm, over the same resamples.
    """

    medians: dict[str, float]
    under: float
    pearson: float
    spearman: float
    zero: float
    against: dict[str, Interval]
    ahead: dict[str, Interval]


def summary(points: Points, arm: str, base: str, weights: Array) -> Summary:
    """Summarise an arm at the longest horizon, beside a base arm."""
    from scipy import stats

    distance = points.distance[arm][:, -1]
    by_class = {name: distance[points.of_class(name)] for name in CLASSES}
    varied = np.ptp(distance) > 0 and np.ptp(points.loss) > 0
    areas = {other: aucs(points, distance, other, weights) for other in ("random", "low")}
    reference = {other: aucs(points, points.distance[base][:, -1], other, weights) for other in areas}
    return Summary(
        {name: float(np.median(values)) for name, values in by_class.items()},
        float((by_class["high"] < np.quantile(by_class["low"], 0.75)).mean()),
        float(stats.pearsonr(points.loss, distance).statistic) if varied else float("nan"),
        float(stats.spearmanr(points.loss, distance).statistic) if varied else float("nan"),
        float((distance == 0).mean()),
        {other: interval(values) for other, values in areas.items()},
        {other: interval(areas[other] - reference[other]) for other in areas},
    )
