"""Searches each block's scale among the neighbours of the one that `quantize` gives.

A scale is a byte: E4M3 has eight to an octave and E8M0 one, so all scales between two multiples are tried, none twice.

E experts, N output rows, K inputs, B blocks of K, S elements of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from moelab.quant import method
from pallas_kernels import formats
from pallas_kernels.formats import E4M3, FORMATS, BlockScaled

METRICS = ("mse", "norm", "output")
_NORM = 2.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched(method.Method):
    """A method whose scales may be searched.

    Attributes:
      search: "none": scales of block maxima. Or by the block's error: "mse" the sum of |w - q|^2, "norm" of
        |w - q|^2.4, "output" (w - q) H (w - q)^T with the block's part of the Hessian, which needs statistics.
      smallest, largest: multiples of the block maximum's scale between which scales are tried.
    """

    search: str = "none"
    smallest: float = 0.2
    largest: float = 1.5

    def __post_init__(self):
        method.check_choice("search", self.search, ("none", *METRICS))
        method.check_between("smallest", self.smallest, 1 / 64, 1)
        method.check_between("largest", self.largest, 1, 64)

    def check(self, weights, statistics, format: str) -> None:
        super().check(weights, statistics, format)
        if self.search == "output" and statistics is None:
            raise ValueError('search "output" needs statistics of calibration, got None')
        if self.search != "none" and FORMATS[format].float_scales:
            allowed = [name for name, spec in FORMATS.items() if not spec.float_scales]
            raise ValueError(
                f"search must be none for format {format!r}: scales are searched for {', '.join(allowed)}"
            )

    def rounded(
        self, w_ENK: jax.Array, hessian_EKK: jax.Array | None, format: str, rule: str | None
    ) -> BlockScaled:
        """Rounds to nearest under the scales that the search finds."""
        start = method.round_to_nearest(w_ENK, format, rule)
        if self.search == "none":
            return start
        offsets = _offsets(format, self.smallest, self.largest)
        return _searched(w_ENK, start, hessian_EKK, self.search, offsets)


def block_error(
    w_ENK: jax.Array, value_ENK: jax.Array, hessian_EKK: jax.Array | None, metric: str, size: int
) -> jax.Array:
    """Returns the error of each block of `size` inputs: (E, N, B) float32; see `Searched`."""
    shape = (*w_ENK.shape[:-1], w_ENK.shape[-1] // size, size)
    delta_ENBS = (value_ENK - w_ENK).reshape(shape)
    if metric == "mse":
        return jnp.sum(jnp.square(delta_ENBS), axis=-1)
    if metric == "norm":
        return jnp.sum(jnp.abs(delta_ENBS) ** jnp.float32(_NORM), axis=-1)
    part_EBSS = _diagonal_blocks(hessian_EKK, size)
    product = jnp.einsum("enbs,ebst->enbt", delta_ENBS, part_EBSS, precision=lax.Precision.HIGHEST)
    return jnp.sum(product * delta_ENBS, axis=-1)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _searched(
    w_ENK: jax.Array,
    start: BlockScaled,
    hessian_EKK: jax.Array | None,
    metric: str,
    offsets: tuple[int, ...],
) -> BlockScaled:
    spec = FORMATS[start.format]

    def error_of(scale_ENB):
        wide_ENK = jnp.repeat(scale_ENB, spec.block, axis=-1)
        value_ENK = formats.nearest(w_ENK, wide_ENK, start.global_amax, start.format)
        error_ENB = block_error(w_ENK, value_ENK, hessian_EKK, metric, spec.block)
        return _shared(error_ENB, spec.block_rows)

    def consider(best, offset):
        scale_ENB = _neighbour(start.scales, offset, spec.scale)
        error_ENB = error_of(scale_ENB)
        # Never where one is NaN, so that a broken block stays broken, and never where the block is zero.
        better = error_ENB < best[1]
        pair = (scale_ENB, error_ENB)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), pair, best), None

    first = (start.scales, error_of(start.scales))
    (scale_ENB, _), _ = lax.scan(consider, first, jnp.asarray(offsets, jnp.int32))
    return formats.quantize_with(w_ENK, dataclasses.replace(start, scales=scale_ENB))


def _offsets(format: str, smallest: float, largest: float) -> tuple[int, ...]:
    """Steps in bytes that cover the multiples, the nearest first: of equal errors the first stays."""
    per_octave = 2**E4M3.mantissa_bits if FORMATS[format].scale == "e4m3" else 1
    down = math.ceil(-math.log2(smallest) * per_octave)
    up = math.ceil(math.log2(largest) * per_octave)
    return tuple(sorted((i for i in range(-down, up + 1) if i), key=abs))


def _neighbour(scale: jax.Array, offset: jax.Array, kind: str) -> jax.Array:
    """Returns the byte so many steps away, inside the finite range."""
    last = E4M3.max_code if kind == "e4m3" else 254
    return jnp.clip(scale.astype(jnp.int32) + offset, 1, last).astype(jnp.uint8)


def _shared(error_ENB: jax.Array, block_rows: int) -> jax.Array:
    """Sums over the rows of a tile, which share a scale."""
    if block_rows == 1:
        return error_ENB
    experts, rows, columns = error_ENB.shape
    tiles = error_ENB.reshape(experts, rows // block_rows, block_rows, columns).sum(axis=2)
    return tiles.repeat(block_rows, axis=1)


def _diagonal_blocks(hessian_EKK: jax.Array, size: int) -> jax.Array:
    experts, width, _ = hessian_EKK.shape
    grid = hessian_EKK.reshape(experts, width // size, size, width // size, size)
    return jnp.moveaxis(jnp.diagonal(grid, axis1=1, axis2=3), -1, 1)
