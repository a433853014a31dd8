"""The search: every layout and batch of a system that fits, their times, the Pareto front of speed and throughput."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from moelab.errors import UserError
from moelab.plan import calibration as calibrations
from moelab.plan import coverage, recipes, serving, work
from moelab.plan.calibration import Calibration
from moelab.plan.figures import scaled
from moelab.plan.hardware import System
from moelab.plan.models import Model
from moelab.plan.recipes import Recipe
from moelab.plan.roofline import ENGINES, Efficiency
from moelab.plan.serving import Load
from moelab.plan.work import Layout

BATCHES = tuple(sorted({round(2 ** (i / 2)) for i in range(21)}))  # 1, 1.4, 2, ... 1024, rounded
MOST_TP, MOST_PP = 16, 8
LEAST_SLICE = 128  # columns of an expert that is cut, on one GPU: what the kernels' tiles want


class DoesNotFit(UserError):
    """A model that the system's memory cannot hold; the message says by how many bytes."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is searched under which conditions.

    Attributes:
      engine: one of ENGINES: its fixed latencies.
      years: of the software after 2026-01-01.
      most_ttft, most_tpot: limits in seconds.
      calibration: the calibrated values.
    """

    engine: str = "trtllm"
    years: float = 0.0
    most_ttft: float = math.inf
    most_tpot: float = math.inf
    calibration: Calibration = dataclasses.field(default_factory=calibrations.shipped)


@dataclasses.dataclass(frozen=True)
class Found:
    """Configurations that fit, one per row.

    Attributes:
      system, model, recipe, load: what was searched.
      layout, batch: (n,) each; batch is of one attention copy.
      tpot, ttft: seconds.
      user: output tokens per second of one user.
      throughput: output tokens per second and GPU, prefill GPUs included.
      used: bytes of one GPU.
      low, high: factors of the 80 % band of tpot.
      notes: per row, what is outside the calibrated range.
    """

    system: System
    model: Model
    recipe: Recipe
    load: Load
    layout: Layout
    batch: np.ndarray
    tpot: np.ndarray
    ttft: np.ndarray
    throughput: np.ndarray
    used: np.ndarray
    low: np.ndarray
    high: np.ndarray
    notes: tuple[tuple[str, ...], ...]

    @property
    def user(self) -> np.ndarray:
        """Output tokens per second of one user."""
        return 1 / self.tpot

    def front(self) -> np.ndarray:
        """Returns the rows that nothing beats in both speed and throughput, fastest first."""
        order = np.lexsort((-self.throughput, self.tpot))
        best = np.maximum.accumulate(np.concatenate([[-1.0], self.throughput[order]]))[:-1]
        return order[self.throughput[order] > best]

    def row(self, i: int) -> dict:
        """Returns one row as plain values."""
        at = lambda x: int(np.broadcast_to(x, self.batch.shape)[i])  # noqa: E731
        sizes = {n: at(getattr(self.layout, n)) for n in ("tp", "dp", "ep", "pp")}
        return {
            **sizes,
            "gpus": math.prod((sizes["tp"], sizes["dp"], sizes["pp"])),
            "batch": int(self.batch[i]),
            "tpot_ms": 1e3 * float(self.tpot[i]),
            "tpot_ms_low": 1e3 * float(self.tpot[i] * self.low[i]),
            "tpot_ms_high": 1e3 * float(self.tpot[i] * self.high[i]),
            "ttft_ms": 1e3 * float(self.ttft[i]),
            "user_tokens_per_s": float(self.user[i]),
            "gpu_tokens_per_s": float(self.throughput[i]),
            "gpu_tokens_per_s_low": float(self.throughput[i] / self.high[i]),
            "gpu_tokens_per_s_high": float(self.throughput[i] / self.low[i]),
            "used_bytes": float(self.used[i]),
            "outside_calibrated_range": list(self.notes[i]),
        }

    def at_speed(self, user: float) -> int | None:
        """Returns the row with the highest throughput at so many tokens/s/user or more; None: nothing is so fast."""
        able = np.flatnonzero(self.user >= user)
        return int(able[np.argmax(self.throughput[able])]) if len(able) else None

    def band_at_speed(self, user: float) -> tuple[float, float]:
        """Returns the 80 % band of the best tokens/s/GPU at a speed: all times at one end of their band, searched anew.

        Wider than the band of one configuration: whoever turns out slower has to run smaller batches. 0: not so fast.
        """
        ends = []
        for factor in (self.high, self.low):
            rates = (self.throughput / factor)[self.user / factor >= user]
            ends.append(float(rates.max(initial=0.0)))
        return ends[0], ends[1]


def layouts(model: Model, count: int, domain: int) -> Layout:
    """Lists the layouts of a replica on up to `count` GPUs that divide them.

    tp divides the heads and stays within the scale-up domain and MOST_TP.
    """
    found = []
    for group in _divisors(count):
        for tp in _divisors(group):
            if tp > min(MOST_TP, domain) or model.attention.heads % tp:
                continue
            for ep in _divisors(group):
                if not _splits(model, group, ep, domain):
                    continue
                for pp in _divisors(count // group):
                    if pp <= min(MOST_PP, model.layers):
                        found.append((tp, group // tp, ep, pp))
    return Layout(*np.array(found).T)


def _splits(model: Model, group: int, ep: int, domain: int) -> bool:
    """Whether the experts of a layer can be shared: whole slices of them, and each slice within a scale-up domain."""
    if not model.experts:
        return ep == 1
    slice_ = group // ep
    wide = model.expert_width >= LEAST_SLICE * slice_ and model.expert_width % slice_ == 0
    wide = wide or slice_ == 1  # a narrow expert that is not cut runs, if badly
    return ep <= model.experts and wide and slice_ <= domain


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def search(
    model: Model, recipe: Recipe, system: System, load: Load, options: Options | None = None
) -> Found:
    """Times every layout and batch that fits.

    Raises:
      DoesNotFit: none does.
      HardwareError: the GPU lacks a precision of the recipe.
      UserError: the limits leave nothing.
    """
    options = options or Options()
    layout, batch = candidates(model, recipe, system, load)
    found = _time(model, recipe, system, layout, batch, skewed(model, load, options), options)
    keep = (found.tpot <= options.most_tpot) & (found.ttft <= options.most_ttft)
    if not keep.any():
        raise UserError(
            f"{model.name} in {recipe.name} on {system.name}: the limits leave nothing; the fastest configuration has "
            f"{1e3 * found.tpot.min():.3g} ms per token, the shortest wait is {1e3 * found.ttft.min():.3g} ms"
        )
    return _keep(found, keep)


def candidates(
    model: Model, recipe: Recipe, system: System, load: Load
) -> tuple[Layout, np.ndarray]:
    """Lists every layout and batch that fits, one per row.

    Raises:
      DoesNotFit: none does.
      HardwareError: the GPU lacks a precision of the recipe.
    """
    for precision in recipe.precisions():
        system.gpu.peak(precision)
    every = layouts(model, system.count, int(system.gpu.domain.value))
    most = np.floor(serving.largest_batch(model, recipe, system.gpu, every, load))
    if most.max() < 1:
        raise DoesNotFit(_too_large(model, recipe, system, every, load))
    pairs = [(i, b) for i in np.flatnonzero(most >= 1) for b in BATCHES if b <= most[i]]
    index, batch = (np.array(x) for x in zip(*pairs, strict=True))
    return _pick(every, index), batch.astype(float)


def skewed(model: Model, load: Load, options: Options) -> Load:
    """Returns the load with the calibrated inequality of the experts, where it has none of its own."""
    if load.p_E is not None or not model.experts:
        return load
    p_E = coverage.skewed(model.experts, model.k, options.calibration.skew)
    return dataclasses.replace(load, p_E=p_E)


def _pick(layout: Layout, index) -> Layout:
    return Layout(*(getattr(layout, n)[index] for n in ("tp", "dp", "ep", "pp")))


def _keep(found: Found, keep: np.ndarray) -> Found:
    index = np.flatnonzero(keep)
    names = ("batch", "tpot", "ttft", "throughput", "used", "low", "high")
    return dataclasses.replace(
        found,
        layout=_pick(found.layout, index),
        notes=tuple(found.notes[i] for i in index),
        **{n: getattr(found, n)[index] for n in names},
    )


def _too_large(model, recipe, system, every, load) -> str:
    need, room = _least_bytes(model, recipe, every, load), _room(system)
    total = model.weight_bytes(recipe)
    return (
        f"{model.name} in {recipe.name} does not fit {system.name}: {scaled(total, 'B')} of weights and a sequence "
        f"of {load.isl + load.osl} tokens need {scaled(need, 'B')} on each GPU, {scaled(room, 'B')} are usable: "
        f"{math.ceil(need - room)} bytes too many per GPU; {_alternatives(model, recipe, system, load)}"
    )


def _room(system: System) -> float:
    return system.gpu.memory.value * (1 - serving.RESERVED)


def _least_bytes(model, recipe, every, load) -> float:
    """Returns what the most economical layout needs on a GPU for one sequence."""
    least = work.weight_bytes(model, recipe, every)
    return float((least + work.kv_bytes(model, recipe, every, load.isl + load.osl / 2)).min())


def _alternatives(model, recipe, system, load) -> str:
    """Names what would fit: more of these GPUs, and the format nearest to the one asked for."""
    gpu, domain = system.gpu, int(system.gpu.domain.value)
    fits = lambda r, n: _least_bytes(model, r, layouts(model, n, domain), load) <= _room(system)  # noqa: E731
    counts = (system.count * 2**i for i in range(1, 8))
    more = next((n for n in counts if n <= 4096 and fits(recipe, n)), None)
    smaller = [
        r
        for r in recipes.RECIPES.values()
        if model.weight_bytes(r) < model.weight_bytes(recipe)
        and all(p in gpu.peaks for p in r.precisions())
        and fits(r, system.count)
    ]
    found = [f"{gpu.name}x{more}"] if more else []
    if smaller:
        found.append(f"{system.name} in {max(smaller, key=model.weight_bytes).name}")
    return (
        f"it would fit {' or '.join(found)}"
        if found
        else "neither more of them nor fewer bits help"
    )


def evaluate(
    model: Model,
    recipe: Recipe,
    system: System,
    layout: Layout,
    batch,
    load: Load,
    options: Options | None = None,
) -> Found:
    """Times given configurations, whether they fit or not."""
    options = options or Options()
    load = skewed(model, load, options)
    sizes = np.broadcast_arrays(layout.tp, layout.dp, layout.ep, layout.pp, batch)
    sizes = [np.atleast_1d(x) for x in sizes]
    return _time(model, recipe, system, Layout(*sizes[:4]), sizes[4].astype(float), load, options)


def timer(model, recipe, system, layout, batch, load, options) -> Callable:
    """Counts the work of rows once and returns a function: efficiency -> (tpot, ttft, throughput), each (n,)."""
    gpu, engine = system.gpu, ENGINES.index(options.engine)
    prepared = serving.prepare(model, recipe, gpu, layout, batch, load.isl, load.osl, load)
    weights = work.weight_bytes(model, recipe, layout)
    fits = weights < gpu.memory.value * (1 - serving.RESERVED)

    def times(efficiency: Efficiency) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        how = (efficiency, engine, options.years, load.overlap)
        tpot, gpus = serving.tpot(prepared, *how), layout.gpus.astype(float)
        rate = batch * layout.dp * layout.pp / tpot
        if load.disaggregated:  # as many prefill GPUs as the prompts need, where they cost least
            cost = serving.prompt_time(prepared, *how) * gpus / (layout.dp * layout.pp)
            gpus = gpus + rate / load.osl * np.where(fits, cost, np.inf).min()
        return tpot, serving.ttft(prepared, *how), rate / gpus

    return times


def _time(model, recipe, system, layout, batch, load, options) -> Found:
    times = timer(model, recipe, system, layout, batch, load, options)
    tpot, ttft, throughput = times(options.calibration.efficiency)
    used = work.weight_bytes(model, recipe, layout)
    used = used + batch * work.kv_bytes(model, recipe, layout, load.isl + load.osl / 2)
    notes = _notes(model, recipe, system, layout, batch, load, options)
    bounds = np.array([options.calibration.bounds(bool(note)) for note in notes])
    return Found(
        *(system, model, recipe, load, layout, batch, tpot, ttft, throughput, used),
        low=bounds[:, 0],
        high=bounds[:, 1],
        notes=notes,
    )


def _notes(model, recipe, system, layout, batch, load, options) -> tuple:
    calibration = options.calibration
    always = calibration.outside(
        isl=load.isl,
        osl=load.osl,
        parameters=model.total(),
        experts=model.experts,
        gpu=system.gpu.name,
        precision=recipe.name.partition("+")[0],
        software=options.years,
    )
    if load.draft:
        always += ("speculative decoding",)
    if load.disaggregated:
        always += ("disaggregated",)
    if load.overlap != "none":
        always += (f"overlap {load.overlap}",)
    cached: dict[tuple, tuple] = {}
    rows = []
    for gpus, size in zip(layout.gpus.tolist(), batch.tolist(), strict=True):
        if (gpus, size) not in cached:
            cached[gpus, size] = always + calibration.outside(gpus=gpus, batch=size)
        rows.append(cached[gpus, size])
    return tuple(rows)
