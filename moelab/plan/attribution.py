"""Splits the gain from one way of serving to another into its causes: Shapley values of the logarithm of throughput.

What a cause is worth depends on what was changed before it, so it is averaged over all orders:

    phi_i = sum_S |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)),   v(S) = log throughput, causes S switched over

The shares multiply to the whole gain. At equal configuration (layout and batch) memory cannot matter; at equal
interactivity every set of causes is searched anew for the best throughput at the asked tokens/s/user.

Reference: L. Shapley, A Value for n-Person Games (1953).
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from moelab.errors import UserError
from moelab.plan import search
from moelab.plan.figures import Figure
from moelab.plan.hardware import Gpu, System
from moelab.plan.models import Model
from moelab.plan.recipes import Recipe
from moelab.plan.search import Options
from moelab.plan.serving import Load
from moelab.plan.work import Layout

CAUSES = {
    "silicon": "peaks of the tensor cores in bfloat16 and FP8",
    "bandwidth": "of the memory",
    "fp4_bytes": "formats in which weights, keys and values are stored",
    "fp4_flops": "precision that multiplies, and its ratio to FP8's peak",
    "memory": "capacity: larger batches, fewer GPUs for a replica",
    "width": "GPUs, scale-up domain and links: expert-parallel width",
    "speculation": "drafted tokens",
    "software": "date of the software",
}


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of serving a model: system, recipe, load, date of the software in years after 2026-01-01."""

    system: System
    recipe: Recipe
    load: Load
    years: float = 0.0


Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Attribution:
    """A gain and its shares.

    Attributes:
      basis: "equal configuration" or "equal interactivity", with the point.
      before, after: tokens/s/GPU.
      factors: cause -> factor; they multiply to after / before.
      intervals: cause -> 80 % interval of the factor over what the calibrated values could be; "gain" too. What the
        form of the model gets wrong is not in it.
      missed: sets of causes, of all, that reach the speed nowhere; there the fastest configuration counts, its
        throughput reduced by what is missing to the speed.
      sets: how many sets were evaluated.
    """

    basis: str
    before: float
    after: float
    factors: dict[str, float]
    intervals: dict[str, Interval]
    missed: int
    sets: int

    @property
    def gain(self) -> float:
        """After over before."""
        return self.after / self.before


def shapley(names: tuple[str, ...], value) -> dict:
    """Returns the Shapley value of every name.

    Args:
      value: frozenset of names -> number, or an array of them.

    >>> shapley(("a", "b"), lambda s: {0: 0.0, 1: 1.0, 2: 4.0}[len(s)])
    {'a': 2.0, 'b': 2.0}
    """
    n, found = len(names), {}
    for name in names:
        rest = [other for other in names if other != name]
        total = 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for chosen in itertools.combinations(rest, size):
                total += weight * (value(frozenset({*chosen, name})) - value(frozenset(chosen)))
        found[name] = total
    return found


def mixed(a: Way, b: Way, switched: frozenset[str]) -> Way:
    """Returns the way in which the switched causes are as in b and the others as in a.

    Where fp4 multiplies and the silicon is still a's, its peak is a's FP8 peak times the ratio that b's has.
    """
    pick = lambda cause: b if cause in switched else a  # noqa: E731
    silicon, width = pick("silicon").system.gpu, pick("width").system
    peaks = dict(silicon.peaks)
    for precision in ("fp8", "fp4"):
        if precision not in peaks:
            source = b if precision in b.system.gpu.peaks else a
            have = source.system.gpu.peaks
            below = "fp8" if precision == "fp4" and "fp8" in peaks else "bf16"
            if precision in have and below in have:
                ratio = have[precision].value / have[below].value
                peaks[precision] = Figure(
                    peaks[below].value * ratio, "FLOP/s", have[precision].source
                )
    gpu = Gpu(
        *(width.gpu.name, width.gpu.maker_name, silicon.capability, peaks),
        memory=pick("memory").system.gpu.memory,
        bandwidth=pick("bandwidth").system.gpu.bandwidth,
        nvlink=width.gpu.nvlink,
        domain=width.gpu.domain,
        nic=width.gpu.nic,
        power=width.gpu.power,
    )
    stored, computed = pick("fp4_bytes").recipe, pick("fp4_flops").recipe
    recipe = dataclasses.replace(stored, compute=computed.compute, core=computed.core)
    speculation = pick("speculation").load
    load = dataclasses.replace(a.load, draft=speculation.draft, acceptance=speculation.acceptance)
    return Way(System(gpu, width.count), recipe, load, pick("software").years)


def causes(a: Way, b: Way) -> tuple[str, ...]:
    """Names the causes in which two ways differ."""
    g, h = a.system.gpu, b.system.gpu
    value = lambda gpu, name: getattr(gpu, name).value  # noqa: E731
    peaks = lambda gpu: {k: gpu.peaks[k].value for k in ("bf16", "fp8") if k in gpu.peaks}  # noqa: E731
    wires = ("domain", "nvlink", "nic")
    links = lambda w: (w.system.count, *(value(w.system.gpu, n) for n in wires))  # noqa: E731
    differ = {
        "silicon": peaks(g) != peaks(h),
        "bandwidth": value(g, "bandwidth") != value(h, "bandwidth"),
        "fp4_bytes": (a.recipe.formats, a.recipe.kv_bits) != (b.recipe.formats, b.recipe.kv_bits),
        "fp4_flops": (a.recipe.compute, a.recipe.core) != (b.recipe.compute, b.recipe.core),
        "memory": value(g, "memory") != value(h, "memory"),
        "width": links(a) != links(b),
        "speculation": (a.load.draft, a.load.acceptance) != (b.load.draft, b.load.acceptance),
        "software": a.years != b.years,
    }
    return tuple(name for name in CAUSES if differ[name])


def equal_configuration(
    model: Model, a: Way, b: Way, layout: Layout, batch: int, options: Options | None = None
) -> Attribution:
    """Attributes the gain at one layout and batch, whether or not it fits."""
    options = options or Options()
    one = Layout(*(np.array([x]) for x in (layout.tp, layout.dp, layout.ep, layout.pp)))

    def throughput(way: Way) -> np.ndarray:
        return _throughputs(model, way, one, np.array([float(batch)]), options)[1][:, 0]

    names = tuple(n for n in causes(a, b) if n != "memory")
    point = f"equal configuration: tp {layout.tp}, dp {layout.dp}, ep {layout.ep}, batch {batch}"
    return _attribute(point, a, b, names, throughput, [0])


def equal_interactivity(
    model: Model, a: Way, b: Way, user: float, options: Options | None = None
) -> Attribution:
    """Attributes the gain in the best throughput at so many tokens/s/user.

    Raises:
      UserError: one of the two ways is nowhere so fast.
    """
    options, missed = options or Options(), [0]

    def throughput(way: Way, strict: bool = False) -> np.ndarray:
        try:
            layout, batch = search.candidates(model, way.recipe, way.system, way.load)
        except search.DoesNotFit:
            if strict:
                raise
            missed[0] += 1
            return _too_small(model, way, options)
        tpot_Sn, rate_Sn = _throughputs(model, way, layout, batch, options)
        able_Sn = 1 / tpot_Sn >= user
        if strict and not able_Sn[0].any():
            raise UserError(
                f"{model.name} in {way.recipe.name} on {way.system.name} reaches "
                f"{1 / tpot_Sn[0].min():.1f} tokens/s/user at most, not {user:g}"
            )
        missed[0] += not able_Sn[0].any()
        fastest_S1 = tpot_Sn.argmin(1)[:, None]
        reached = np.where(able_Sn, rate_Sn, 0).max(1)
        rate, tpot = (np.take_along_axis(x, fastest_S1, 1)[:, 0] for x in (rate_Sn, tpot_Sn))
        return np.where(able_Sn.any(1), reached, rate / tpot / max(user, 1e-9))

    for way in (a, b):
        throughput(way, strict=True)
    point = f"equal interactivity: {user:g} tokens/s/user"
    return _attribute(point, a, b, causes(a, b), throughput, missed)


def _throughputs(model: Model, way: Way, layout: Layout, batch, options: Options):
    """Returns (tpot, tokens/s/GPU) of rows under the calibrated values and every draw of them, each (S, n)."""
    own = dataclasses.replace(options, years=way.years)
    load = search.skewed(model, way.load, own)
    times = search.timer(model, way.recipe, way.system, layout, batch, load, own)
    values = (own.calibration.efficiency, *own.calibration.drawn())
    found = [times(efficiency) for efficiency in values]
    return np.array([f[0] for f in found]), np.array([f[2] for f in found])


def _too_small(model: Model, way: Way, options: Options) -> np.ndarray:
    """Returns the throughput of one sequence on all GPUs, as if it did fit."""
    group = int(min(way.system.count, search.MOST_TP, way.system.gpu.domain.value))
    layout = Layout(np.array([group]), np.array([1]), np.array([1]), np.array([1]))
    return _throughputs(model, way, layout, np.ones(1), options)[1][:, 0]


def _attribute(basis, a, b, names, throughput, missed) -> Attribution:
    known: dict[frozenset, np.ndarray] = {}

    def value(chosen: frozenset) -> np.ndarray:
        if chosen not in known:
            known[chosen] = np.log(throughput(mixed(a, b, chosen)))
        return known[chosen]

    shares = shapley(names, value)
    before, after = value(frozenset()), value(frozenset(names))
    factors = {name: float(np.exp(share[0])) for name, share in shares.items()}
    spread = shares | {"gain": after - before}
    intervals = {
        n: tuple(np.exp(np.quantile(x[1:], [0.1, 0.9])).tolist()) for n, x in spread.items()
    }
    ends = (float(np.exp(before[0])), float(np.exp(after[0])))
    return Attribution(basis, *ends, factors, intervals, missed[0], len(known))
