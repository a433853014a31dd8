"""Uncertainty of reported numbers: a paired bootstrap over documents and a paired t interval over seeds.

Documents, not tokens, are the unit: tokens of one document are dependent, so resampling tokens would promise too much.
Both precisions see the same resampled documents, and domains keep their number of documents (they are fixed by design).

D documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from moelab.report.documents import ALL, Documents

CONFIDENCE = 0.95
RESAMPLES = 4999
SEED = 0  # of the resampling; fixed, so that a report can be made again digit for digit


class Interval(NamedTuple):
    """An estimate and the bounds of its 95 % interval, in the unit of the estimate."""

    estimate: float
    low: float
    high: float


class PairedT(NamedTuple):
    """The mean of paired differences b - a, its 95 % interval, the two-sided p value and the number of pairs."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def half_width(few: float, few_freedom: int, many: float, many_freedom: int) -> float:
    """Returns half the width of a 95 % interval whose variance is the sum of two that were estimated apart.

    Between two: sqrt(t_few^2 few + t_many^2 many), which covers up to 98 % where both matter, and t sqrt(few + many)
    with Satterthwaite's degrees of freedom, which covers 92 % where two degrees of freedom are nearly all of it. Their
    mean covers 94 to 97 % (tests/report_paired_test.py, tests/report_fits_test.py); with one degree of freedom it is
    the wider one.

    Args:
      few, few_freedom: a variance and its degrees of freedom, of a few seeds.
      many, many_freedom: of what there is more of.
    """
    wide = math.sqrt(_t(few_freedom) ** 2 * few + _t(many_freedom) ** 2 * many)
    if few_freedom < 2 or not few + many > 0:
        return wide
    freedom = (few + many) ** 2 / (few**2 / few_freedom + many**2 / many_freedom)
    return (wide + _t(freedom) * math.sqrt(few + many)) / 2


def _t(freedom: float) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def ratio_difference(
    a_D: np.ndarray,
    b_D: np.ndarray,
    weight_D: np.ndarray,
    stratum_D: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Bootstraps sum(b - a) / sum(weight) over whole documents, resampled within their stratum.

    Args:
      a_D: (D,) float64 sums per document of the reference, for example nats.
      b_D: (D,) float64 sums per document of the variant.
      weight_D: (D,) denominators > 0, for example bytes or tokens.
      stratum_D: (D,) labels; each stratum keeps its number of documents in every resample.
      resamples: bootstrap resamples.
      seed: of the resampling.

    Returns:
      The ratio and its 95 % percentile interval. The bounds are NaN where a value is not finite or where no stratum
      has two documents: nothing can be resampled there.

    Raises:
      ValueError: shapes disagree, no documents, or a weight that is not positive.
    """
    a_D, b_D, weight_D = (np.asarray(v, np.float64) for v in (a_D, b_D, weight_D))
    stratum_D = np.asarray(stratum_D)
    if not a_D.shape == b_D.shape == weight_D.shape == stratum_D.shape or a_D.ndim != 1:
        shapes = a_D.shape, b_D.shape, weight_D.shape, stratum_D.shape
        raise ValueError(f"a, b, weight and stratum want one shape (D,); got {shapes}")
    if not a_D.size or not (weight_D > 0).all():
        raise ValueError("a ratio over documents wants at least one document and weights > 0")
    difference_D = b_D - a_D
    estimate = float(difference_D.sum() / weight_D.sum())
    if not np.isfinite(difference_D).all():
        return Interval(estimate, math.nan, math.nan)
    if not difference_D.any():  # the same predictions: no resample can differ
        return Interval(0.0, 0.0, 0.0)
    groups = [np.flatnonzero(stratum_D == s) for s in dict.fromkeys(stratum_D.tolist())]
    constant = [g[0] for g in groups if g.size == 1]  # scipy resamples only two and more
    groups = [g for g in groups if g.size > 1]
    if not groups:
        return Interval(estimate, math.nan, math.nan)
    rest_d, rest_w = difference_D[constant].sum(), weight_D[constant].sum()

    def ratio(*index: np.ndarray, axis: int = -1) -> np.ndarray:
        chosen = [i.astype(np.int64) for i in index]
        top = sum(difference_D[i].sum(axis) for i in chosen) + rest_d
        return top / (sum(weight_D[i].sum(axis) for i in chosen) + rest_w)

    bounds = stats.bootstrap(
        groups,
        ratio,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // a_D.size),  # about 16 MB of indices at one time
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(estimate, float(bounds.low), float(bounds.high))


def loss_difference(documents: Documents, reference: str, variant: str) -> Interval:
    """Bootstraps the loss of `variant` minus that of `reference`, in nats per token."""
    return _difference(documents, reference, variant, documents.tokens_D.astype(np.float64), ALL)


def bits_per_byte_difference(
    documents: Documents, reference: str, variant: str, domain: str = ALL
) -> Interval:
    """Bootstraps the bits per byte of `variant` minus those of `reference`, over all or a domain."""
    weight_D = documents.bytes_D * math.log(2.0)
    return _difference(documents, reference, variant, weight_D, domain)


def bits_per_byte_between(a: Documents, b: Documents, precision: str) -> Interval:
    """Bootstraps the bits per byte of run b minus those of run a under one precision.

    Raises:
      ValueError: the runs were not evaluated on the same documents.
    """
    keys_a, keys_b = (list(zip(t.domain_D, t.document_D, strict=True)) for t in (a, b))
    place = {key: i for i, key in enumerate(keys_b)}
    if place.keys() != set(keys_a):
        raise ValueError("a paired difference wants the same documents in both runs")
    nats_D = b.nats[precision][[place[key] for key in keys_a]]
    weight_D = a.bytes_D * math.log(2.0)
    return ratio_difference(a.nats[precision], nats_D, weight_D, a.domain_D)


def _difference(
    documents: Documents, reference: str, variant: str, weight_D: np.ndarray, domain: str
) -> Interval:
    for name in (reference, variant):
        if name not in documents.nats:
            raise ValueError(f"no precision {name!r}; choose from {documents.precisions}")
    if domain not in (ALL, *documents.domains):
        raise ValueError(f"no domain {domain!r}; choose from {(ALL, *documents.domains)}")
    chosen_D = np.full(weight_D.shape, True) if domain == ALL else documents.domain_D == domain
    nats = documents.nats
    columns = (nats[reference], nats[variant], weight_D, documents.domain_D)
    return ratio_difference(*(column[chosen_D] for column in columns))


def paired_t(a: Sequence[float], b: Sequence[float]) -> PairedT:
    """Tests paired values, such as two arms that share seeds, with Student's t.

    mean(b - a) +- t(0.975, n - 1) sd / sqrt(n)

    Raises:
      ValueError: not two equally long sequences of at least two values.
    """
    a_N, b_N = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a_N.shape != b_N.shape or a_N.ndim != 1 or a_N.size < 2:
        raise ValueError(f"a paired t wants two sequences of n >= 2; got {a_N.shape}, {b_N.shape}")
    difference_N = b_N - a_N
    mean = float(difference_N.mean())
    if np.ptp(difference_N) == 0:  # no spread: the interval is a point, p is 0 or undefined
        return PairedT(mean, mean, mean, 0.0 if mean else math.nan, a_N.size)
    result = stats.ttest_rel(b_N, a_N)
    low, high = result.confidence_interval(CONFIDENCE)
    return PairedT(mean, float(low), float(high), float(result.pvalue), a_N.size)
