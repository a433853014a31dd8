"""How each kernel family's tilings walk over a product, for `roofline`; and the tilings that it chooses among.

None of this was measured: not yet run on hardware.
"""

from __future__ import annotations

import functools

import numpy as np

from pallas_kernels import roofline
from pallas_kernels.formats import FORMATS
from pallas_kernels.grouped_matmul import (
    mosaic_sm90_tiling,
    mosaic_sm100_decode,
    mosaic_sm100_tiling,
)
from pallas_kernels.roofline import Limits, Product, Schedule


def of_sm100(tiling: mosaic_sm100_tiling.Tiling, format: str) -> Schedule:
    """Of `mosaic_sm100`."""
    return Schedule(
        rows=tiling.tile_m,
        columns=tiling.tile_n,
        depth=tiling.tile_k,
        aligned=True,
        step_bytes=tiling.stage_bytes(format) * tiling.num_ctas,
        stages=tiling.stages,
        ctas=tiling.num_ctas,
    )


def of_sm100_decode(tiling: mosaic_sm100_decode.Tiling, format: str) -> Schedule:
    """Of `mosaic_sm100_decode`. An MMA of few columns may take longer than their share, which is not counted."""
    return Schedule(
        rows=tiling.tile_t,
        columns=mosaic_sm100_tiling.TILE_M,
        depth=tiling.tile_k,
        aligned=True,
        step_bytes=tiling.stage_bytes(format),
        stages=tiling.stages,
    )


def of_sm90(tiling: mosaic_sm90_tiling.Tiling, format: str) -> Schedule:
    """Of `mosaic_sm90`. Decoding weights takes issue slots that the model does not count."""
    weights = tiling.tile_m * tiling.tile_k // 2 + tiling.tile_m * tiling.scale_rows(format)
    return Schedule(
        rows=tiling.tile_n,
        columns=tiling.tile_m,
        depth=tiling.tile_k,
        aligned=False,
        step_bytes=weights + 2 * tiling.tile_n * tiling.tile_k,
        stages=tiling.stages,
    )


def of_triton(tiling, format: str) -> Schedule:
    """Of `triton_w4a16`. One program on a multiprocessor is assumed; decoding is not counted."""
    scales = tiling.block_n * tiling.block_k // FORMATS[format].block
    weights = tiling.block_n * tiling.block_k // 2 + scales
    return Schedule(
        rows=tiling.block_m,
        columns=tiling.block_n,
        depth=tiling.block_k,
        aligned=True,
        step_bytes=weights + 2 * tiling.block_m * tiling.block_k,
        stages=tiling.num_stages,
    )


# Budgets decide the depths: five stages of 128 x 128 tiles, fewer of wider ones.
PLAIN = mosaic_sm100_tiling.Tiling(tile_n=128, stages=5)
WIDE = mosaic_sm100_tiling.Tiling(tile_n=256, stages=3, accumulators=1)
PAIRED = mosaic_sm100_tiling.Tiling(tile_n=256, stages=4, accumulators=1, collective=True)
SM100 = {"128x128": PLAIN, "128x256": WIDE, "256x256, 2 CTAs": PAIRED}
# Tokens of a tile, with operands swapped: as deep a ring as fits.
SM100_SWAPPED = {f"{tile_t}x128, swapped": tile_t for tile_t in (8, 16, 32, 64)}
# A tenth is no difference: the model is not that good, and the first tilings are the simplest.
_HANDICAP = {"128x128": 1.0, "128x256": 1.1, "256x256, 2 CTAs": 1.2} | dict.fromkeys(
    SM100_SWAPPED, 1.1
)


def sm100_tiling(
    name: str, format: str, out_dtype: np.dtype
) -> mosaic_sm100_tiling.Tiling | mosaic_sm100_decode.Tiling:
    """Returns the tiling of `mosaic_sm100` or `mosaic_sm100_decode` of a name in SM100 or SM100_SWAPPED."""
    if name in SM100_SWAPPED:
        return mosaic_sm100_decode.default_tiling(SM100_SWAPPED[name], format, out_dtype)
    return SM100[name].storing(out_dtype)


def sm100_schedule(name: str, product: Product) -> Schedule:
    """Returns how the tiling of a name in SM100 or SM100_SWAPPED walks over a product."""
    if name in SM100:
        return of_sm100(SM100[name], product.w)
    out_dtype = np.dtype(f"V{product.out_bytes}")
    return of_sm100_decode(sm100_tiling(name, product.w, out_dtype), product.w)


def _scale_tiles_bytes(product: Product, tile_t: int) -> float:
    """What XLA writes, and the kernel reads again, of a tile of scales for each block of tokens, most of it zeros."""
    blocks = -(-product.rows // tile_t)
    scales = mosaic_sm100_tiling.TILE_M * product.inputs / FORMATS[product.x].block
    return 2 * blocks * scales


@functools.cache
def choose_sm100(product: Product, limits: Limits = roofline.B200, collective: bool = True) -> str:
    """Returns the name in SM100 or SM100_SWAPPED of the fastest tiling for a product; the first of equals.

    Args:
      product: its outputs and inputs are multiples of 128 and 256.
      limits: of the GPU.
      collective: whether tiles of two CTAs may be chosen: interpret mode has none.
    """
    fits = [
        name
        for name, tiling in SM100.items()
        if product.outputs % tiling.tile_n == 0 and (collective or not tiling.collective)
    ]

    def seconds(name: str) -> float:
        time = roofline.roofline(product, sm100_schedule(name, product), limits).time
        if name in SM100_SWAPPED:
            time += _scale_tiles_bytes(product, SM100_SWAPPED[name]) / limits.hbm
        return time * _HANDICAP[name]

    return min((*fits, *SM100_SWAPPED), key=seconds)


def before_and_after(
    kernel: str, product: Product, limits: Limits
) -> tuple[tuple[str, Schedule], tuple[str, Schedule]]:
    """Returns name and schedule of a family's first tiling and of the one that it chooses for a product.

    Raises:
      ValueError: an unknown family.
    """
    touched = max(sum(size > 0 for size in product.sizes_E), 1)
    if kernel == "mosaic_sm100":
        chosen = choose_sm100(product, limits)
        return tuple((n, sm100_schedule(n, product)) for n in (next(iter(SM100)), chosen))
    if kernel == "mosaic_sm90":
        fitted = mosaic_sm90_tiling.default_tiling(
            product.rows / touched, product.outputs, product.inputs, product.w, np.dtype("float32")
        )
        found = (mosaic_sm90_tiling.Tiling(), fitted)
        return tuple(
            (f"{t.tile_m}x{t.tile_n}x{t.tile_k}, {t.stages} stages", of_sm90(t, product.w))
            for t in found
        )
    if kernel == "triton_w4a16":
        from pallas_kernels.grouped_matmul import triton_w4a16

        shape = (product.outputs, product.inputs, (9, 0))
        found = tuple(
            triton_w4a16.default_tiling(rows, *shape) for rows in (128, product.rows / touched)
        )
        return tuple(
            (f"{t.block_m}x{t.block_n}x{t.block_k}, {t.num_stages} stages", of_triton(t, product.w))
            for t in found
        )
    raise ValueError(f"no schedule is known of {kernel!r}")
