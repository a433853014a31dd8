"""Curves through a few points, with intervals that say when a few points do not tell.

IsoFLOP: at one budget, loss is a parabola in the logarithm of the size. Granularity: loss falls as a power of it.
Crossover: where the difference of two arms changes its sign, whatever the shape of their curves. Seeds are blocks: each
has a level of its own, which says nothing about the shape.

The interval of a bottom is Fieller's, which is exact for normal noise and becomes unbounded where the denominator could
be zero; that of the loss there has the variance between seeds and that of the curve; that of the exponent is where the
F test of its value does not reject; that of a crossover where the paired t test over seeds does not tell the arms
apart. All are 95 %.

S seeds, X points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from moelab.report.statistics import CONFIDENCE, Interval, half_width

_PLACES = 2001  # at which two curves are compared
_EXPONENTS = np.geomspace(0.02, 20.0, 400)  # searched; outside, a power is a logarithm or a step
_ROUNDING = 1e-12  # relative; what differs by less is equal


class IsoFlop(NamedTuple):
    """The bottom of a parabola in log size: the best size, its loss, and whether it lies inside the sizes that ran."""

    size: Interval
    loss: Interval
    inside: bool


class PowerLaw(NamedTuple):
    """y = exp(intercept) * x^exponent: the exponent, the intercept of log y, and the points' number."""

    exponent: Interval
    intercept: float
    n: int


class Granularity(NamedTuple):
    """loss = floor + gain * g^-exponent: the exponent with its interval, and the other two at its best value.

    A constant loss has no gain and fits every exponent: NaN, from 0 to infinity.
    """

    exponent: Interval
    floor: float
    gain: float


class Crossover(NamedTuple):
    """Where two arms are equal: the place, and whether arm b is the better one beyond it."""

    place: Interval
    b_gains: bool


def isoflop(sizes: Sequence[float], loss: np.ndarray) -> IsoFlop:
    """Finds the size of least loss at one budget (Hoffmann et al., arXiv:2203.15556, approach 2).

    loss = level of the seed + b log N + c (log N)^2;  N* = exp(-b / 2c)

    Args:
      sizes: (X,) parameters, > 0, at least three different ones.
      loss: (X,), or (S, X) with a row per seed.

    Returns:
      The best size: bounds 0 and infinity where the points do not show a minimum, NaN where the curve has none. The
      loss there is by the delta method, its interval over all seeds that might have been where several ran, else of
      this seed; NaN where the size has no bounds or lies outside those that ran.

    Raises:
      ValueError: too few points, or values that are not positive and finite.
    """
    log_X, loss_SX = _checked(sizes, loss, 3)
    middle = log_X.mean()
    u_X = log_X - middle  # centred: the three coefficients are then nearly independent
    design = np.stack([u_X, u_X**2], axis=1)
    (b, c), covariance, variance, freedom = _blocked(design, loss_SX)
    nothing = Interval(math.nan, math.nan, math.nan)
    if c <= 0 or _constant(loss_SX):  # a hill, or a line
        return IsoFlop(Interval(math.nan, 0.0, math.inf), nothing, False)
    bottom = -b / (2 * c)
    twice = covariance * np.array([[1, 2], [2, 4]])
    bounds = _fieller(b, 2 * c, twice, _t(freedom))
    size = Interval(*(_exp(value + middle) for value in (bottom, *bounds)))
    inside = bool(log_X.min() <= bottom + middle <= log_X.max())
    if not inside or math.inf in size:
        return IsoFlop(size, nothing, inside)
    gradient = np.array([bottom, bottom**2]) - design.mean(axis=0)
    best = float(loss_SX.mean() + gradient @ (b, c))
    of_curve, seeds = float(gradient @ covariance @ gradient), len(loss_SX)
    if seeds > 1:  # means of seeds vary by their levels and by the noise of their points
        level = float(loss_SX.mean(axis=1).var(ddof=1) / seeds)
        half = half_width(level, seeds - 1, of_curve, freedom)
    else:
        half = _t(freedom) * math.sqrt(of_curve + variance / loss_SX.size)
    return IsoFlop(size, Interval(best, best - half, best + half), inside)


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fits a straight line in both logarithms, as for the best size over budgets; the exponent of a constant y is 0.

    Raises:
      ValueError: fewer than three points, or values that are not positive and finite.
    """
    log_X, _ = _checked(x, y, 3)
    log_y_X, _ = _checked(y, x, 1)
    if _constant(np.asarray(y, np.float64)[None]):
        return PowerLaw(Interval(0.0, 0.0, 0.0), float(log_y_X.mean()), log_X.size)
    found = stats.linregress(log_X, log_y_X)
    half = _t(log_X.size - 2) * found.stderr
    exponent = Interval(found.slope, found.slope - half, found.slope + half)
    return PowerLaw(Interval(*map(float, exponent)), float(found.intercept), log_X.size)


def granularity(values: Sequence[float], loss: np.ndarray) -> Granularity:
    """Fits how loss falls with the granularity of experts (Krajewski et al., arXiv:2402.07871, eq. 6, size fixed).

    loss = level of the seed + gain * g^-exponent

    Args:
      values: (X,) granularities, > 0, at least three different ones.
      loss: (X,), or (S, X) with a row per seed.

    Returns:
      The exponent, searched from 0.02 to 20: a bound is 0 or infinity where the points exclude nothing on that side.

    Raises:
      ValueError: too few points for three numbers, or values that are not positive and finite.
    """
    log_X, loss_SX = _checked(values, loss, 3)
    seeds, points = loss_SX.shape
    freedom = seeds * points - seeds - 2
    if freedom < 1:
        raise ValueError("a power with a level wants four points, or more seeds")
    if _constant(loss_SX):
        return Granularity(Interval(math.nan, 0.0, math.inf), float(loss_SX.mean()), 0.0)

    def residual(exponent: float) -> float:
        return _power_residual(exponent, log_X, loss_SX)

    grid = np.array([residual(e) for e in _EXPONENTS])
    best = int(grid.argmin())
    around = _EXPONENTS[max(best - 1, 0)], _EXPONENTS[min(best + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(residual, bounds=around, method="bounded")
    exponent, least = float(found.x), float(found.fun)
    limit = least * (1 + stats.f.ppf(CONFIDENCE, 1, freedom) / freedom)
    accepted = np.flatnonzero(grid <= limit)
    low, high = exponent, exponent
    if accepted.size:
        low = _edge(residual, limit, accepted[0], -1, exponent)
        high = _edge(residual, limit, accepted[-1], 1, exponent)
    x_X = np.exp(-exponent * log_X)
    gain = float(_slope(x_X, loss_SX))
    floor = float(loss_SX.mean() - gain * x_X.mean())
    return Granularity(Interval(exponent, low, high), floor, gain)


def _constant(value_SX: np.ndarray) -> bool:
    """Says whether no seed's values differ by more than rounding."""
    return bool(np.ptp(value_SX, axis=1).max() <= _ROUNDING * np.abs(value_SX).max())


def _power_residual(exponent: float, log_X: np.ndarray, loss_SX: np.ndarray) -> float:
    x_X = np.exp(-exponent * log_X)
    centred = loss_SX - loss_SX.mean(axis=1, keepdims=True)
    return float(((centred - _slope(x_X, loss_SX) * (x_X - x_X.mean())) ** 2).sum())


def _slope(x_X: np.ndarray, loss_SX: np.ndarray) -> float:
    d_X = x_X - x_X.mean()
    return (loss_SX.mean(axis=0) @ d_X) / (d_X @ d_X)


def _edge(residual, limit: float, index: int, side: int, exponent: float) -> float:
    """Finds where the residual crosses the limit beside the outermost accepted exponent of the grid."""
    beyond = index + side
    if not 0 <= beyond < len(_EXPONENTS):
        return 0.0 if side < 0 else math.inf
    return float(
        optimize.brentq(lambda e: residual(e) - limit, _EXPONENTS[index], _EXPONENTS[beyond])
    )


def crossovers(x: Sequence[float], a: np.ndarray, b: np.ndarray) -> list[Crossover]:
    """Finds the costs at which two arms are equal, between costs where each is better than the other.

    Curves are lines in log x between the points. At each cost the paired t test over seeds says whether b - a differs
    from 0; an interval is what lies between a stretch where b is worse and one where it is better. At the true place it
    does not reject in 95 %, whatever the points of one seed have in common.

    Args:
      x: (X,) budgets or sizes, > 0, increasing, at least two.
      a, b: (S, X) losses of the arms, with the same seeds in the same order, at least two.

    Returns:
      The places in order of x; none where it is not shown that the curves cross.

    Raises:
      ValueError: shapes disagree, too few points or seeds, or values that are not finite.
    """
    log_X, a_SX = _checked(x, a, 2)
    b_SX = _checked(x, b, 2)[1]
    if a_SX.shape != b_SX.shape:
        raise ValueError(f"a crossover wants paired seeds; got {a_SX.shape} and {b_SX.shape}")
    seeds = a_SX.shape[0]
    if seeds < 2 or (np.diff(log_X) <= 0).any():
        raise ValueError("a crossover wants two seeds, and x in increasing order")
    place_P = np.union1d(log_X, np.linspace(log_X[0], log_X[-1], _PLACES))
    difference_SP = np.array([np.interp(place_P, log_X, row) for row in b_SX - a_SX])
    mean_P = difference_SP.mean(axis=0)
    error_P = difference_SP.std(axis=0, ddof=1) / math.sqrt(seeds)
    sign_P = np.where(np.abs(mean_P) > _t(seeds - 1) * error_P, np.sign(mean_P), 0)
    told = np.flatnonzero(sign_P)
    found = []
    for left, right in zip(told[:-1], told[1:], strict=True):
        if sign_P[left] != sign_P[right]:
            # The first change of the mean's sign; between these two it may wander.
            turn = (
                left
                + np.flatnonzero(
                    np.sign(mean_P[left:right]) != np.sign(mean_P[left + 1 : right + 1])
                )[0]
            )
            share = mean_P[turn] / (mean_P[turn] - mean_P[turn + 1])
            zero = place_P[turn] + share * (place_P[turn + 1] - place_P[turn])
            bounds = Interval(*(math.exp(u) for u in (zero, place_P[left], place_P[right])))
            found.append(Crossover(bounds, bool(sign_P[left] > 0)))
    return found


def _blocked(design: np.ndarray, loss_SX: np.ndarray):
    """Least squares with a level per seed: coefficients, covariance, residual variance, degrees of freedom."""
    seeds, points = loss_SX.shape
    freedom = seeds * points - seeds - design.shape[1]
    if freedom < 1:
        raise ValueError(f"{points} points of {seeds} seeds leave no freedom; add points or seeds")
    centred = design - design.mean(axis=0)
    if np.linalg.matrix_rank(centred) < design.shape[1]:
        raise ValueError("too few different sizes")
    rest_SX = loss_SX - loss_SX.mean(axis=1, keepdims=True)
    normal = np.linalg.inv(centred.T @ centred)
    found = normal @ (centred.T @ rest_SX.mean(axis=0))
    variance = float(((rest_SX - centred @ found) ** 2).sum() / freedom)
    return found, normal * variance / seeds, variance, freedom


def _fieller(p: float, q: float, covariance: np.ndarray, quantile: float) -> tuple[float, float]:
    """Bounds of -p / q: the u at which p + q u does not differ from zero; everything where q might be zero.

    (p + q u)^2 <= t^2 (Vpp + 2 u Vpq + u^2 Vqq)
    """
    square = quantile**2
    a = q * q - square * covariance[1, 1]
    half_b = p * q - square * covariance[0, 1]
    c = p * p - square * covariance[0, 0]
    if a <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(half_b * half_b - a * c, 0.0))
    return (-half_b - root) / a, (-half_b + root) / a


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 or math.isnan(value) else math.inf


def _t(freedom: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def _checked(x: Sequence[float], y: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns log x, and y with a row per seed."""
    x_X, y_SX = np.asarray(x, np.float64), np.atleast_2d(np.asarray(y, np.float64))
    if x_X.ndim != 1 or y_SX.ndim != 2 or y_SX.shape[1] != x_X.size:
        raise ValueError(f"wants x (X,) and y (X,) or (S, X); got {x_X.shape} and {y_SX.shape}")
    if not (np.isfinite(x_X).all() and (x_X > 0).all() and np.isfinite(y_SX).all()):
        raise ValueError("wants positive finite x and finite y")
    if np.unique(x_X).size < least:
        raise ValueError(f"wants at least {least} different x; got {np.unique(x_X).size}")
    return np.log(x_X), y_SX
