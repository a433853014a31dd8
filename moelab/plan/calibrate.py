"""Fits efficiencies and latencies to measured rows, with priors, and says how sure they are.

The six or so numbers that serving measurements can tell apart are not as many as the model has: efficiencies of memory,
compute and links trade against each other. So the fit is bounded (memory at most 0.92 of its peak) and pulled towards
priors from kernel measurements, in log space:

    minimise sum_i w_i rho((log TPOT_i - log model_i) / 0.2) + sum_j ((log theta_j - log prior_j) / width_j)^2

rho is Huber's, and the rows of one sweep share the weight of one observation. How unequal the experts' loads are is not
smooth in the counts, so that one is chosen from a list by the same sum.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from moelab.plan import coverage, hardware, measured, recipes, roofline, serving
from moelab.plan.measured import Row
from moelab.plan.roofline import ENGINES, Efficiency
from moelab.plan.serving import Prepared
from moelab.plan.work import Layout

NOISE = 0.2  # error of log TPOT beyond which a row counts linearly


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One calibrated value: its prior (log-normal) and bounds."""

    name: str
    prior: float
    width: float
    low: float
    high: float
    about: str


_KERNELS = (
    "achieved share of the peak in the wheel's kernel tables, TensorRT-LLM, fact sheet of 2026-11"
)
PARAMETERS = (
    Parameter("compute.bf16", 0.55, 0.25, 0.1, 0.9, f"dense peak; {_KERNELS}"),
    Parameter("compute.fp8", 0.45, 0.25, 0.1, 0.9, f"dense peak; {_KERNELS}"),
    Parameter("compute.fp4", 0.28, 0.25, 0.05, 0.9, f"dense peak; {_KERNELS}"),
    Parameter("memory.bf16", 0.70, 0.20, 0.2, 0.92, f"bandwidth; {_KERNELS}"),
    Parameter("memory.fp8", 0.60, 0.20, 0.2, 0.92, f"bandwidth; {_KERNELS}"),
    Parameter("memory.fp4", 0.45, 0.20, 0.15, 0.92, f"bandwidth; {_KERNELS}"),
    Parameter("memory.keys", 0.60, 0.30, 0.1, 0.92, "bandwidth, keys and values"),
    Parameter("link.nvlink", 0.55, 0.40, 0.1, 0.92, "link speed in one direction"),
    Parameter("link.nic", 0.80, 0.20, 0.2, 0.92, "link speed; DeepEP over 4 nodes, no serving row"),
    Parameter("layer.trtllm", 70e-6, 0.50, 5e-6, 500e-6, "seconds per layer"),
    Parameter("layer.sglang", 80e-6, 0.50, 5e-6, 500e-6, "seconds per layer"),
    Parameter("layer.vllm", 80e-6, 0.50, 5e-6, 500e-6, "seconds per layer"),
    Parameter("collective", 8e-6, 0.50, 1e-6, 100e-6, "seconds per collective operation"),
    Parameter("step", 0.6e-3, 0.50, 1e-5, 1e-2, "seconds per step"),
    Parameter("mixing", 1.2, 0.30, 0.5, 5.0, "prompt time in a decoding batch over its own"),
    Parameter("drift", 0.3, 0.70, 0.01, 2.0, "decline of fixed latencies per year of software"),
)
NAMES = tuple(p.name for p in PARAMETERS)


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows with their counted work."""

    rows: tuple[Row, ...]
    prepared: Prepared
    engine_n: np.ndarray
    years_n: np.ndarray
    tpot_n: np.ndarray
    ttft_n: np.ndarray


def efficiency(theta: Sequence[float]) -> Efficiency:
    """Makes the roofline's efficiencies of the parameters' values, in the order of PARAMETERS."""
    return Efficiency(
        compute=tuple(theta[0:3]),
        memory=tuple(theta[3:7]),
        link=tuple(theta[7:9]),
        layer=tuple(theta[9:12]),
        collective=theta[12],
        step=theta[13],
        mixing=theta[14],
        drift=theta[15],
    )


def data(rows: Sequence[Row], skew: float = 0.0) -> Data:
    """Counts the work of measured rows, batches cut to what the memory holds.

    Args:
      skew: exponent of the experts' loads (coverage.skewed).
    """
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.model, row.gpu, row.precision), []).append(i)
    parts, order = [], []
    for (name, gpu_name, precision), index in groups.items():
        mine = [rows[i] for i in index]
        field = lambda n, mine=mine: np.array([getattr(r, n) for r in mine], float)  # noqa: E731
        model, gpu = measured.model(name), hardware.find(gpu_name)
        recipe, layout = recipes.named(precision), Layout(field("tp"), field("dp"), field("ep"))
        most = np.concatenate(
            [
                serving.largest_batch(
                    *(model, recipe, gpu, Layout(r.tp, r.dp, r.ep)), serving.Load(r.isl, r.osl)
                )
                for r in mine
            ]
        )
        # A row that ran did fit: where the count leaves no room, it is the count that is off.
        batch = np.where(most < 1, field("batch"), np.minimum(field("batch"), most))
        p_E = coverage.skewed(model.experts, model.k, skew)
        lengths, load = (field("isl"), field("osl")), serving.Load(0, 0, by_load=False, p_E=p_E)
        parts.append(serving.prepare(model, recipe, gpu, layout, batch, *lengths, load))
        order += index
    back = np.argsort(order)
    rows_ = tuple(rows)
    return Data(
        rows_,
        _take(_join(parts), back),
        np.array([ENGINES.index(r.engine) for r in rows_]),
        np.array([r.years for r in rows_]),
        np.array([r.tpot for r in rows_]),
        np.array([r.ttft for r in rows_]),
    )


def _join(parts: Sequence[Prepared]) -> Prepared:
    return Prepared(
        roofline.concatenate([p.decode for p in parts]),
        roofline.concatenate([p.prompt for p in parts]),
        np.concatenate([p.share_n for p in parts]),
    )


def _take(prepared: Prepared, index: np.ndarray) -> Prepared:
    def terms(t):
        fields = dataclasses.fields(t)
        return roofline.Terms(*(getattr(t, f.name)[..., index] for f in fields))

    return Prepared(terms(prepared.decode), terms(prepared.prompt), prepared.share_n[index])


def subset(found: Data, keep: Callable[[Row], bool]) -> Data:
    """Keeps the rows that a condition holds for."""
    index = np.array([i for i, row in enumerate(found.rows) if keep(row)], int)
    return Data(
        tuple(found.rows[i] for i in index),
        _take(found.prepared, index),
        *(getattr(found, n)[index] for n in ("engine_n", "years_n", "tpot_n", "ttft_n")),
    )


def predict(found: Data, values: Efficiency) -> np.ndarray:
    """Returns seconds per output token of every row."""
    return serving.tpot(found.prepared, values, found.engine_n, found.years_n)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Values that fit some rows.

    Attributes:
      theta: in the order of PARAMETERS.
      skew: exponent of the experts' loads.
      loss: what was minimised.
    """

    theta: np.ndarray
    skew: float
    loss: float

    @property
    def efficiency(self) -> Efficiency:
        """For the roofline."""
        return efficiency(self.theta)


SKEWS = (0.0, 0.3, 0.5, 0.7, 0.9)


def all_data(rows: Sequence[Row]) -> dict[float, Data]:
    """Counts the work under every skew of the list."""
    return {skew: data(rows, skew) for skew in SKEWS}


def fit(found: dict[float, Data], keep: Callable[[Row], bool] = lambda _: True) -> Fit:
    """Fits the rows that a condition holds for, under the skew that fits best."""
    fits = (_fit(subset(one, keep), skew) for skew, one in found.items())
    return min(fits, key=lambda f: f.loss)


def _fit(found: Data, skew: float, weight_n: np.ndarray | None = None, shift=0.0) -> Fit:
    """Fits under one skew; `weight_n` weighs the rows, `shift` moves the priors' centres by so many widths."""
    from scipy import optimize

    width = np.array([p.width for p in PARAMETERS])
    prior = np.log([p.prior for p in PARAMETERS]) + shift * width
    target, scale_n = np.log(found.tpot_n), np.sqrt(1 / _sweep_sizes(found.rows))
    scale_n = scale_n if weight_n is None else scale_n * np.sqrt(weight_n)

    def residuals(log_theta):
        error = (np.log(predict(found, efficiency(np.exp(log_theta)))) - target) / NOISE
        # Huber's loss, for the rows alone: the priors keep their squares.
        far = np.sign(error) * np.sqrt(np.maximum(2 * np.abs(error) - 1, 0))
        return np.concatenate(
            [np.where(np.abs(error) > 1, far, error) * scale_n, (log_theta - prior) / width]
        )

    bounds = (np.log([p.low for p in PARAMETERS]), np.log([p.high for p in PARAMETERS]))
    start = np.clip(prior, bounds[0] + 1e-6, bounds[1] - 1e-6)
    solution = optimize.least_squares(residuals, start, bounds=bounds, max_nfev=60)
    return Fit(np.exp(solution.x), skew, float(2 * solution.cost))


def band(found: dict[float, Data], fitted: Fit, keep=lambda _: True, folds: int = 10):
    """Measures how far off a new sweep is: 10 % and 90 % quantiles of log(measured / predicted).

    Sweeps are dealt into folds, each predicted by a fit to the others under the same skew.

    Returns:
      (low, high), added to a prediction's logarithm: an 80 % band.
    """
    rows = subset(found[fitted.skew], keep)
    names = sorted({sweep(row) for row in rows.rows}, key=str)
    dealt = np.random.default_rng(0).permutation(len(names))
    fold = {name: int(dealt[i]) % folds for i, name in enumerate(names)}
    errors = []
    for i in range(min(folds, len(names))):
        others = subset(rows, lambda r, i=i: fold[sweep(r)] != i)
        mine = subset(rows, lambda r, i=i: fold[sweep(r)] == i)
        predicted = predict(mine, _fit(others, fitted.skew).efficiency)
        errors.append(np.log(mine.tpot_n / predicted))
    low, high = np.quantile(np.concatenate(errors), [0.1, 0.9])
    return float(low), float(high)


def draws(found: dict[float, Data], fitted: Fit, count: int = 20) -> np.ndarray:
    """Resamples sweeps and draws the priors' centres anew: so many other values that could be, (count, parameters)."""
    rows = found[fitted.skew]
    names = [sweep(row) for row in rows.rows]
    unique = sorted(set(names), key=str)
    index_n = np.array([unique.index(name) for name in names])
    generator, thetas = np.random.default_rng(0), []
    for _ in range(count):
        times = np.bincount(
            generator.integers(len(unique), size=len(unique)), minlength=len(unique)
        )
        shift = generator.normal(size=len(PARAMETERS))
        thetas.append(_fit(rows, fitted.skew, times[index_n].astype(float), shift).theta)
    return np.array(thetas)


def sweep(row: Row) -> tuple:
    """Names the sweep that a row belongs to."""
    return (row.model, row.gpu, row.engine, row.precision, row.tp, row.dp, row.ep)


def _sweep_sizes(rows: Sequence[Row]) -> np.ndarray:
    names = [sweep(row) for row in rows]
    counts = collections.Counter(names)
    return np.array([counts[name] for name in names], float)
