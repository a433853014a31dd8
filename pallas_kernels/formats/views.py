"""Other ways to hold a BlockScaled: scales as tensor cores read them, and MXFP4 as NVFP4.

E experts, N rows, K contraction axis.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats import elements, layout
from pallas_kernels.formats.block_scaled import BlockScaled
from pallas_kernels.formats.elements import E2M1, E4M3, E8M0_NAN
from pallas_kernels.formats.table import FORMATS

# E4M3 has the powers of two from 2^-9 to 2^8: an MXFP4 scale may be 2^17 times smaller than the largest one.
_LARGEST_E4M3_EXPONENT = 8
_EXPONENT_RANGE = 17
_NONE = -128  # the largest exponent of no block
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = (
    -118,
    124,
)  # of the largest scale, for a normal global scale and a finite amax


def swizzled_scales(q: BlockScaled) -> jax.Array:
    """Returns the scales in the 128x4 tiles of cuBLAS and tcgen05, each matrix padded with zeros to whole tiles.

    `layout.swizzle_groups(q.scales, group_sizes_E)` does the same for rows that belong to consecutive experts.

    Args:
      q: quantized array [..., N, K] with byte scales.

    Returns:
      uint8 [..., ceil(N / 128), ceil(K / (4 * block)), 32, 16].

    Raises:
      ValueError: a format with float scales, or fewer than two axes.
    """
    _check_byte_scales(q.format)
    if q.ndim < 2:
        raise ValueError(f"swizzled_scales needs at least two axes, got shape {q.shape}")
    return layout.swizzle(q.scales)


def from_swizzled(
    codes: jax.Array, tiles: jax.Array, global_amax: jax.Array | None, format: str, rule: str
) -> BlockScaled:
    """Builds a BlockScaled from swizzled scales: the inverse of `swizzled_scales`.

    Args:
      codes: as BlockScaled has them, [..., N, K / 2] or [..., N, K].
      tiles: uint8 [..., ceil(N / 128), ceil(K / (4 * block)), 32, 16].
      global_amax: the leading axes' global amax, or None.
      format: key of FORMATS with byte scales.
      rule: scale rule that made them.

    Raises:
      ValueError: unknown format or rule, or tiles of another array.
    """
    _check_byte_scales(format)
    spec = FORMATS[format]
    if rule not in spec.rules:
        raise ValueError(
            f"unknown rule {rule!r} for format {format}; allowed: {', '.join(spec.rules)}"
        )
    columns = codes.shape[-1] * (8 // spec.element.bits) // spec.block
    scales = layout.unswizzle(tiles, codes.shape[-2], columns)
    return BlockScaled(codes, scales, global_amax, format, rule)


def mxfp4_to_nvfp4(
    q: BlockScaled, *, num_batch_axes: int | None = None, rounding: bool = False
) -> BlockScaled:
    """Turns MXFP4 into NVFP4 with the same codes: each block becomes two whose scale is a power of two.

    With k the exponents of the blocks that have a nonzero code, and k_max their largest below one global scale:

        global_amax = 2688 * 2^(k_max - 8),  scale = 2^(k - k_max + 8),  codes as they are

    Exact where k_max - k <= 17 (E4M3 ends at 2^-9) and -118 <= k_max <= 124 (float32 ends).

    Args:
      q: MXFP4 [..., K].
      num_batch_axes: how many leading axes have their own global scale. Default ndim - 2, as in `quantize`.
      rounding: blocks with k_max - k > 17 get the scale 2^-9 and their values are rounded, to nearest even, to its
        codes. A k_max out of range gives infinite or zero values.

    Returns:
      BlockScaled of format nvfp4. NaN blocks stay NaN; blocks without a nonzero code get scale 0.

    Raises:
      ValueError: another format, or num_batch_axes out of range. Without `rounding`, also a block that NVFP4 cannot
        hold, and traced scales, of which nothing can be said.
    """
    if q.format != "mxfp4":
        raise ValueError(f"mxfp4_to_nvfp4 needs format mxfp4, got {q.format}")
    axes = max(q.ndim - 2, 0) if num_batch_axes is None else num_batch_axes
    if not 0 <= axes < q.ndim:
        raise ValueError(f"num_batch_axes must be from 0 to {q.ndim - 1}, got {axes}")
    cast, out_of_range, inexact = _cast(q, axes)
    if not rounding:
        _check_exact(out_of_range, inexact, q.scales.size)
    return cast


@functools.partial(jax.jit, static_argnums=1)
def _cast(q: BlockScaled, axes: int) -> tuple[BlockScaled, jax.Array, jax.Array]:
    """Returns the value, how many global scales float32 cannot hold, and how many blocks were rounded."""
    nan = q.scales == E8M0_NAN
    code = layout.unpack(q.codes)
    blocks = code.reshape(*q.scales.shape, code.shape[-1] // max(q.scales.shape[-1], 1))
    live = jnp.any((blocks & 7) != 0, axis=-1) & ~nan
    k = q.scales.astype(jnp.int32) - 127
    over = tuple(range(axes, k.ndim))
    k_max = jnp.max(jnp.where(live, k, _NONE), axis=over, initial=_NONE)
    below = k_max.reshape(k_max.shape + (1,) * len(over)) - k
    # A code that is too fine by 2^n is divided by it: rounded once, from its exact value.
    excess = jnp.maximum(below - _EXPONENT_RANGE, 0)
    coarse = elements.encode(elements.decode(blocks, E2M1), E2M1, excess[..., None])
    # Zero and NaN blocks keep their codes, which are zero but for signs.
    code = jnp.where(live[..., None], coarse, blocks).reshape(code.shape)
    exponent = _LARGEST_E4M3_EXPONENT - jnp.clip(below, 0, _EXPONENT_RANGE)
    scale = elements.encode(elements.power_of_two(exponent), E4M3)
    scale = jnp.where(live, scale, jnp.where(nan, jnp.uint8(elements.E4M3_NAN), jnp.uint8(0)))
    unit = elements.power_of_two(jnp.clip(k_max - _LARGEST_E4M3_EXPONENT, -126, 127))
    amax = jnp.float32(E2M1.max_value * E4M3.max_value) * unit
    amax = jnp.where(k_max == _NONE, jnp.float32(0), amax)
    out_of_range = ((k_max < _SMALLEST_EXPONENT) | (k_max > _LARGEST_EXPONENT)) & (k_max > _NONE)
    cast = BlockScaled(layout.pack(code), jnp.repeat(scale, 2, axis=-1), amax, "nvfp4", "amax")
    return cast, out_of_range.sum(), (live & (excess > 0)).sum()


def _check_exact(out_of_range: jax.Array, inexact: jax.Array, blocks: int) -> None:
    if isinstance(inexact, jax.core.Tracer):
        raise ValueError(
            "mxfp4_to_nvfp4 cannot see whether traced scales fit: call it outside jit, or with rounding=True"
        )
    if out_of_range:
        raise ValueError(
            f"mxfp4_to_nvfp4 needs largest scales from 2^{_SMALLEST_EXPONENT} to 2^{_LARGEST_EXPONENT} "
            "(rounding=True does not raise)"
        )
    if inexact:
        raise ValueError(
            f"mxfp4_to_nvfp4 is exact for scales within 2^{_EXPONENT_RANGE} of the largest one: "
            f"{int(inexact)} of {blocks} blocks are smaller (rounding=True rounds them)"
        )


def _check_byte_scales(format: str) -> None:
    allowed = [name for name, spec in FORMATS.items() if not spec.float_scales]
    if format not in allowed:
        raise ValueError(f"format {format!r} has no byte scales; allowed: {', '.join(allowed)}")
