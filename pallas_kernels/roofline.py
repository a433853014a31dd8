"""What bounds a grouped matmul on a GPU, and what share of the limit its schedule can reach: a model, not measured.

A kernel's time is at least that of each resource that it uses, and the largest is its bound:

    HBM      bytes that must cross it once: codes and scales of the experts that have rows, rows, results
    L2       bytes that all tiles load, k-step by k-step, over what the multiprocessors can take from L2 together
    tensor   k-steps of the busiest multiprocessor times the time of their MMAs (full tiles or not)
    latency  k-steps of the busiest multiprocessor times latency / stages: no more can be in flight; and one start

The counts are those of the schedule (`tiles`) and of the main loops: `moelab kernels verify` finds the same MMAs, loads
and bytes of a k-step in the machine code. The limits are XLA's descriptions of the GPUs; L2 bandwidth and latency are
assumed, since no description has them.

T tokens, E experts, N outputs, K inputs, R rows = T times experts per token.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pallas_kernels.formats import FORMATS

BOUNDS = ("HBM", "L2", "tensor", "latency")
LATENCY = 1.0e-6  # assumed: seconds from a load's issue to its arrival
_L2_BYTES_PER_CLOCK = 64  # assumed: of one multiprocessor


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a GPU can do.

    Attributes:
      num_sms: multiprocessors.
      hbm: bytes per second of device memory.
      l2: bytes per second that one multiprocessor takes from L2. Assumed.
      flops: multiplications and additions per second of one multiprocessor's tensor cores, in the kernel's dtype.
      latency: seconds. Assumed.
    """

    num_sms: int
    hbm: float
    l2: float
    flops: float
    latency: float = LATENCY


def limits_of(target, dtype: str) -> Limits:
    """Returns a GPU's limits from its description.

    Args:
      target: a `targets.Target`.
      dtype: of the tensor cores' inputs: "float4_e2m1fn", "bfloat16".

    Raises:
      ValueError: the description has no rate for the dtype.
    """
    if dtype not in target.matrix_flops:
        raise ValueError(f"the description of {target.name} has no rate for {dtype}")
    return Limits(
        num_sms=target.num_sms,
        hbm=target.memory_bandwidth,
        l2=_L2_BYTES_PER_CLOCK * target.clock_hz,
        flops=target.matrix_flops[dtype] / target.num_sms,
    )


# XLA's description of the B200, for the choice of a tiling where the plugin is not at hand; a test compares them.
B200 = Limits(148, 7.67232e12, _L2_BYTES_PER_CLOCK * 1.965e9, 8.9006373208064e15 / 148)


@dataclasses.dataclass(frozen=True)
class Product:
    """One grouped matmul.

    Attributes:
      sizes_E: rows of each expert.
      outputs, inputs: N and K.
      x: format of the rows, or "bfloat16".
      w: format of the weights.
      out_bytes: of an element of the result.
    """

    sizes_E: tuple[int, ...]
    outputs: int
    inputs: int
    x: str
    w: str
    out_bytes: int = 2

    @property
    def rows(self) -> int:
        """R."""
        return sum(self.sizes_E)

    @property
    def flops(self) -> float:
        """Of the rows that there are."""
        return 2.0 * self.rows * self.outputs * self.inputs

    @property
    def hbm_bytes(self) -> float:
        """That must be moved once: weights of experts with rows, rows, results."""
        touched = sum(size > 0 for size in self.sizes_E)
        weights = touched * self.outputs * self.inputs * bits(self.w) / 8
        rows = self.rows * self.inputs * bits(self.x) / 8
        return weights + rows + self.rows * self.outputs * self.out_bytes


def bits(format: str) -> float:
    """Bits of one element, its share of a block's scale included.

    >>> bits("nvfp4"), bits("mxfp4"), bits("bfloat16")
    (4.5, 4.25, 16.0)
    """
    if format not in FORMATS:
        return 8.0 * np.dtype(format).itemsize if format != "bfloat16" else 16.0
    spec = FORMATS[format]
    return spec.element.bits + 8 / spec.block


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a kernel walks over a product.

    Attributes:
      rows, columns, depth: of x, of the result and of the contraction that one tile's k-step covers.
      aligned: whether tiles of rows begin at multiples of `rows`, so that groups share blocks.
      step_bytes: that the CTAs of a tile load in one k-step.
      stages: k-steps in flight.
      ctas: multiprocessors that share a tile.
    """

    rows: int
    columns: int
    depth: int
    aligned: bool
    step_bytes: int
    stages: int
    ctas: int = 1

    def row_tiles(self, sizes_E: tuple[int, ...]) -> int:
        """Tiles of rows over all experts."""
        ends = np.cumsum(np.asarray(sizes_E, np.int64))
        starts = ends - sizes_E
        if self.aligned:
            tiles = (ends - 1) // self.rows - starts // self.rows + 1
        else:
            tiles = -(-(ends - starts) // self.rows)
        return int(np.sum(np.where(ends > starts, tiles, 0)))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds by resource, and what follows.

    Attributes:
      seconds: by name of BOUNDS.
      ideal: seconds of the larger of HBM traffic and useful arithmetic at their peaks: no schedule is faster.
    """

    seconds: dict[str, float]
    ideal: float

    @property
    def bound(self) -> str:
        """What the kernel waits for."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def time(self) -> float:
        """Seconds that it takes at least."""
        return max(self.seconds.values())

    @property
    def share(self) -> float:
        """Of the limit that the schedule can reach: 1 if only HBM or useful arithmetic bounds it."""
        return self.ideal / self.time if self.time else 1.0


def roofline(product: Product, schedule: Schedule, limits: Limits) -> Roofline:
    """Computes the times of a product under a schedule, and the ideal one."""
    tiles = schedule.row_tiles(product.sizes_E) * math.ceil(product.outputs / schedule.columns)
    steps = math.ceil(product.inputs / schedule.depth)
    slots = limits.num_sms // schedule.ctas
    busiest = math.ceil(tiles / slots) * steps  # k-steps of one slot
    mma = 2.0 * schedule.rows * schedule.columns * schedule.depth / (limits.flops * schedule.ctas)
    started = limits.latency if tiles else 0.0
    seconds = {
        "HBM": product.hbm_bytes / limits.hbm,
        "L2": tiles * steps * schedule.step_bytes / (limits.l2 * limits.num_sms),
        "tensor": busiest * mma,
        "latency": busiest * limits.latency / schedule.stages + started,
    }
    ideal = max(seconds["HBM"], product.flops / (limits.flops * limits.num_sms))
    return Roofline(seconds, ideal)


def even(rows: int, experts: int) -> tuple[int, ...]:
    """Rows shared evenly, the first experts taking one more: what is assumed where sizes are not known."""
    return tuple(rows // experts + (e < rows % experts) for e in range(experts))


def random_sizes(tokens: int, experts: int, k: int, seed: int = 0) -> tuple[int, ...]:
    """Rows of each expert where every token picks k distinct experts at random: balanced on average."""
    draw = np.random.default_rng(seed)
    if tokens > 4096:  # the same mean; for so many tokens the spread hardly matters
        return tuple(draw.multinomial(tokens * k, np.full(experts, 1 / experts)).tolist())
    chosen = np.argsort(draw.random((tokens, experts)), axis=1)[:, :k]
    return tuple(np.bincount(chosen.reshape(-1), minlength=experts).tolist())
