"""What a few paired seeds can show, and what they cannot.

Arms of an ablation share seeds, and with them initialisation and order of the data, so their differences per seed are
what is tested: the t interval (statistics.paired_t), an exact test that assumes no distribution, its correction where a
table has many arms, and the smallest effect that so many seeds could have found. A percentile bootstrap over three or
five seeds covers 75 or 84 % where it says 95, and is not used.

S seeds, A arms, R runs of a task, M tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from moelab.report.statistics import CONFIDENCE, RESAMPLES, SEED, Interval

ALPHA, POWER = 1 - CONFIDENCE, 0.8
_EXACT = 20  # pairs; with more, sign patterns are sampled
_SAMPLED = 200_000  # sign patterns
_SIGNS = 2_000_000  # that exist at one time: 16 MB


class SignFlip(NamedTuple):
    """A sign-flip test: two-sided p, the smallest p that so many pairs can reach, and their number."""

    p: float
    smallest: float
    n: int


def sign_flip(a: Sequence[float], b: Sequence[float]) -> SignFlip:
    """Tests whether paired differences are as often one way as the other, size included.

    p = the share of all 2^n sign patterns whose |sum of +-(b - a)| is at least the one that came.

    Its smallest value is 2^(1-n): 0.25 with 3 pairs, 0.0625 with 5, so that fewer than 6 pairs never reach 0.05. With
    more than 20 pairs 200,000 patterns are sampled and the one that came counts, too: the smallest is 1 / 200,001.

    Args:
      a, b: (S,) values of two arms, in the same order of seeds.

    Raises:
      ValueError: not two equally long sequences of at least two finite values.

    >>> sign_flip([0, 0, 0, 0, 0], [1, 2, 3, 4, 5])
    SignFlip(p=0.0625, smallest=0.0625, n=5)
    """
    difference_S = _differences(a, b)
    n = difference_S.size
    tolerance = 1e-12 * np.abs(difference_S).sum()  # sums of the same numbers in another order
    least = abs(difference_S.sum()) - tolerance
    extreme = sum(
        int(np.count_nonzero(np.abs(sign_PS @ difference_S) >= least)) for sign_PS in _signs(n)
    )
    if n <= _EXACT:
        return SignFlip(extreme / 2**n, 2.0 ** (1 - n), n)
    return SignFlip((extreme + 1) / (_SAMPLED + 1), 1 / (_SAMPLED + 1), n)


def _signs(n: int) -> Iterator[np.ndarray]:
    """Sign patterns (P, S) in pieces: all of them, or a sample."""
    rng = np.random.default_rng(SEED)
    patterns = 2**n if n <= _EXACT else _SAMPLED
    step = max(1, _SIGNS // n)
    for first in range(0, patterns, step):
        number_P = np.arange(first, min(first + step, patterns))
        if n <= _EXACT:
            bit_PS = (number_P[:, None] >> np.arange(n)) & 1
        else:
            bit_PS = rng.integers(0, 2, (number_P.size, n), dtype=np.int8)
        yield 1.0 - 2.0 * bit_PS


def holm(p: Sequence[float]) -> list[float]:
    """Corrects the p values of one table for their number (Holm's step-down), in the given order.

    Sorted, p_(i) becomes max over j <= i of (m - j + 1) p_(j), at most 1. NaN, a test that could not be made, stays and
    does not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    found = [math.nan] * len(p)
    tests = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    largest = 0.0
    for rank, (value, i) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * value))
        found[i] = largest
    return found


def power(effect: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """Returns the chance that a two-sided paired t test of n pairs finds a mean difference.

    Args:
      effect: the true mean difference.
      sd: of the paired differences, > 0.
      n: pairs, from 2.
      alpha: level of the test.
    """
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    shift = abs(effect) * math.sqrt(n) / sd
    return float(
        stats.nct.sf(critical, n - 1, shift)
        + (stats.nct.cdf(-critical, n - 1, shift) if shift < 5 else 0.0)
    )


def detectable(sd: float, n: int, alpha: float = ALPHA, wanted: float = POWER) -> float:
    """Returns the smallest mean difference that a paired t test finds with the wanted power.

    Args:
      sd: of the paired differences; 0 gives 0.
      n: pairs, from 2.
      alpha, wanted: level and power.

    Raises:
      ValueError: fewer than two pairs, or a spread that is negative or not finite.

    >>> round(detectable(1.0, 5), 2)  # five seeds find 1.7 standard deviations of a difference, no less
    1.68
    """
    if n < 2 or not (math.isfinite(sd) and sd >= 0):
        raise ValueError(f"a detectable effect wants n >= 2 and a finite sd >= 0; got {n}, {sd}")
    if sd == 0:
        return 0.0
    high = 1.0
    while power(high, 1.0, n, alpha) < wanted:
        high *= 2
    found = optimize.brentq(lambda effect: power(effect, 1.0, n, alpha) - wanted, 0, high)
    return float(sd * found)


def correlation(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Correlates paired values: how much of the noise two arms share, which pairing takes out.

    Returns:
      Pearson's r with Fisher's 95 % interval; NaN bounds below four pairs, NaN where an arm has no spread.

    Raises:
      ValueError: not two equally long sequences of at least two finite values.
    """
    _differences(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Interval(math.nan, math.nan, math.nan)
    if len(a) < 3:
        return Interval(float(np.sign(np.diff(a) * np.diff(b))[0]), math.nan, math.nan)
    found = stats.pearsonr(a, b)
    if len(a) < 4:
        return Interval(float(found.statistic), math.nan, math.nan)
    low, high = found.confidence_interval(CONFIDENCE)
    return Interval(float(found.statistic), float(low), float(high))


def mean_interval(
    values: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """Returns the mean of independent values with its 95 % t interval.

    Args:
      values: (S,); finite.
      within: What such a value can be, as (0, 1) for a share; what of the interval lies outside is cut off.

    Returns:
      NaN bounds for a single value, and where all are the same: their spread says nothing.
    """
    value_S = _finite(values, 1)
    mean, half = float(value_S.mean()), _half(value_S, 1 / value_S.size)
    if (value_S == value_S[0]).all():
        return Interval(mean, math.nan, math.nan)
    return Interval(mean, max(mean - half, within[0]), min(mean + half, within[1]))


def prediction(values: Sequence[float]) -> Interval:
    """Predicts where the value of a new seed falls: mean +- t(0.975, n - 1) sd sqrt(1 + 1 / n).

    Raises:
      ValueError: fewer than two values, or one that is not finite.
    """
    value_S = _finite(values, 2)
    mean, half = float(value_S.mean()), _half(value_S, 1 + 1 / value_S.size)
    return Interval(mean, mean - half, mean + half)


def _half(value_S: np.ndarray, factor: float) -> float:
    if value_S.size < 2:
        return math.nan
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, value_S.size - 1)
    return float(quantile * value_S.std(ddof=1) * math.sqrt(factor))


def interquartile_mean(
    score_RM: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Averages the middle half of all scores, with a bootstrap of the runs within each task.

    As rliable computes it (Agarwal et al., arXiv:2108.13264): a quarter of all runs x tasks is cut from either end.

    Args:
      score_RM: (R, M) scores of R runs on M tasks, such as bits per byte by domain; comparable between tasks.
      resamples, seed: of the bootstrap.

    Returns:
      The interquartile mean and its 95 % percentile interval; NaN bounds for a single run. With few runs the interval
      is too short, as every bootstrap over few units is.

    Raises:
      ValueError: no (R, M) array of finite scores.
    """
    score_RM = np.asarray(score_RM, np.float64)
    if score_RM.ndim != 2 or not score_RM.size or not np.isfinite(score_RM).all():
        raise ValueError(f"wants finite scores (runs, tasks); got shape {score_RM.shape}")
    runs, tasks = score_RM.shape
    estimate = float(stats.trim_mean(score_RM, 0.25, axis=None))
    if runs < 2:
        return Interval(estimate, math.nan, math.nan)
    chosen = np.random.default_rng(seed).integers(0, runs, (resamples, runs, tasks))
    drawn = score_RM[chosen, np.arange(tasks)].reshape(resamples, -1)
    means = stats.trim_mean(drawn, 0.25, axis=1)
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(estimate, float(low), float(high))


def _finite(values: Sequence[float], least: int) -> np.ndarray:
    value_S = np.asarray(values, np.float64)
    if value_S.ndim != 1 or value_S.size < least or not np.isfinite(value_S).all():
        raise ValueError(f"wants at least {least} finite values; got {values!r}")
    return value_S


def _differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    a_S, b_S = (np.asarray(v, np.float64) for v in (a, b))
    if a_S.shape != b_S.shape or a_S.ndim != 1 or a_S.size < 2:
        raise ValueError(f"pairs want two sequences of n >= 2; got {a_S.shape}, {b_S.shape}")
    if not (np.isfinite(a_S).all() and np.isfinite(b_S).all()):
        raise ValueError("pairs want finite values")
    return b_S - a_S
