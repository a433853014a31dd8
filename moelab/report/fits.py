"""Curves through a few points, with intervals that say when a few points do not tell.

IsoFLOP: at one budget, loss is a parabola in the logarithm of the size. Granularity: loss falls as a power of it.
Crossover: where the difference of two arms, a line in the logarithm of the cost, is zero. Seeds are blocks: each has a
level of its own, which says nothing about the shape.

Intervals of ratios are Fieller's, which are exact for normal noise and become unbounded where the denominator could be
zero; that of the exponent is where the F test of its value does not reject. Both are 95 %.

S seeds, X points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from moelab.report.statistics import CONFIDENCE, Interval

_EXPONENTS = np.geomspace(0.02, 20.0, 400)  # searched; outside, a power is a logarithm or a step


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
    """loss = floor + gain * g^-exponent: the exponent with its interval, and the other two at its best value."""

    exponent: Interval
    floor: float
    gain: float


class Crossover(NamedTuple):
    """Where two arms are equal: the place, whether it lies inside what ran, and whether arm b gains with x."""

    place: Interval
    inside: bool
    b_gains: bool


def isoflop(sizes: Sequence[float], loss: np.ndarray) -> IsoFlop:
    """Finds the size of least loss at one budget (Hoffmann et al., arXiv:2203.15556, approach 2).

    loss = level of the seed + b log N + c (log N)^2;  N* = exp(-b / 2c)

    Args:
      sizes: (X,) parameters, > 0, at least three different ones.
      loss: (X,), or (S, X) with a row per seed.

    Returns:
      The best size: bounds 0 and infinity where the points do not show a minimum, NaN where the curve has none. The
      loss there is of the mean seed; its interval is by the delta method.

    Raises:
      ValueError: too few points, or values that are not positive and finite.
    """
    log_X, loss_SX = _checked(sizes, loss, 3)
    middle = log_X.mean()
    u_X = log_X - middle  # centred: the three coefficients are then nearly independent
    design = np.stack([u_X, u_X**2], axis=1)
    (b, c), covariance, variance, freedom = _blocked(design, loss_SX)
    quantile = _t(freedom)
    if c <= 0:  # a hill, or a line
        nothing = Interval(math.nan, math.nan, math.nan)
        return IsoFlop(Interval(math.nan, 0.0, math.inf), nothing, False)
    bottom = -b / (2 * c)
    twice = covariance * np.array([[1, 2], [2, 4]])
    bounds = _fieller(b, 2 * c, twice, quantile)
    size = Interval(*(_exp(value + middle) for value in (bottom, *bounds)))
    gradient = np.array([bottom, bottom**2]) - design.mean(axis=0)
    best = float(loss_SX.mean() + gradient @ (b, c))
    error = math.sqrt(gradient @ covariance @ gradient + variance / loss_SX.size)
    within = bool(log_X.min() <= bottom + middle <= log_X.max())
    return IsoFlop(size, Interval(best, best - quantile * error, best + quantile * error), within)


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fits a straight line in both logarithms, as for the best size over budgets.

    Raises:
      ValueError: fewer than three points, or values that are not positive and finite.
    """
    log_X, _ = _checked(x, y, 3)
    log_y_X, _ = _checked(y, x, 1)
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


def crossover(x: Sequence[float], a: np.ndarray, b: np.ndarray) -> Crossover:
    """Finds the cost at which two arms are equal.

    b - a = p + q log x, fitted for each seed; place = exp(-p / q)

    The noise of the differences is that between seeds, whatever the points of one seed have in common (several budgets
    may be read from one run). With one seed it is that of the points around the line.

    Args:
      x: (X,) budgets or sizes, > 0, at least two different ones.
      a, b: (X,) losses of the arms, or (S, X) with the same seeds in the same order.

    Returns:
      The place: bounds 0 and infinity where it is not shown that the curves cross.

    Raises:
      ValueError: shapes disagree, too few points, or values that are not finite.
    """
    log_X, a_SX = _checked(x, a, 2)
    b_SX = _checked(x, b, 2)[1]
    if a_SX.shape != b_SX.shape:
        raise ValueError(f"a crossover wants paired seeds; got {a_SX.shape} and {b_SX.shape}")
    middle = log_X.mean()
    design = np.stack([np.ones_like(log_X), log_X - middle], axis=1)
    lines_2S = np.linalg.lstsq(design, (b_SX - a_SX).T, rcond=None)[0]
    p, q = lines_2S.mean(axis=1)
    seeds = a_SX.shape[0]
    if seeds > 1:
        covariance, freedom = np.cov(lines_2S) / seeds, seeds - 1
    else:
        freedom = log_X.size - 2
        if freedom < 1:
            raise ValueError("a crossover of one seed wants three points")
        rest = (b_SX - a_SX)[0] - design @ lines_2S[:, 0]
        covariance = np.linalg.inv(design.T @ design) * (rest @ rest / freedom)
    low, high = _fieller(p, q, covariance, _t(freedom))
    place = -p / q if q else math.nan
    within = bool(log_X.min() <= place + middle <= log_X.max())
    bounds = Interval(*(_exp(value + middle) for value in (place, low, high)))
    return Crossover(bounds, within, bool(q < 0))


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
