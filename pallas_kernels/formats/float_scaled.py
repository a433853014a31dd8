"""Codes and scales of the formats whose scales are floats: FP8 per tensor, channel, tile and row group; INT8 and INT4.

K contraction axis (the last), N the axis before.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import elements
from pallas_kernels.formats.elements import Element, Integer

_SMALLEST_SCALE = (
    2.0**-116
)  # below, float32-subnormal inputs matter: 2^-126 / 2^-116 is half of E4M3's smallest number


def codes_and_scales(
    x: jax.Array,
    element: Element | Integer,
    *,
    scale_axes: int,
    tile: tuple[int, int] | None,
    exact_division: bool,
    scale_dtype: jnp.dtype,
    random: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes x with scale = amax / max_value of each group of elements.

    Args:
      x: float32 [..., N, K].
      element: format of the codes.
      scale_axes: how many leading axes have scales of their own, where tile is None.
      tile: rows and columns that share a scale; the last tiles may be smaller.
      exact_division: divide (as DeepSeek and compressed-tensors do), or multiply by reciprocals.
      scale_dtype: of the scales; codes are relative to what is stored.
      random: None, or random bits of x's shape.

    Returns:
      uint8 codes of x's shape, unpacked, and scales: [x.shape[:scale_axes]], or one per tile [..., N / rows,
      K / columns], rounded up.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF  # ordered like the magnitudes
    bits = reduce_max(bits, scale_axes, tile)
    finite = bits < 0x7F800000
    amax = lax.bitcast_convert_type(bits, jnp.float32)
    if exact_division:
        scale = elements.divide(amax, element.max_value)
    else:
        scale = amax * elements.reciprocal(element.max_value)
    if scale_dtype == jnp.bfloat16:  # a conversion there and back XLA may drop
        scale = lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    usable = finite & (scale >= jnp.float32(_SMALLEST_SCALE))
    if exact_division:
        scaled = elements.divide(
            x, expand(jnp.where(usable, scale, jnp.float32(jnp.inf)), x.shape, tile)
        )
    else:
        scaled = x * expand(jnp.where(usable, 1 / scale, jnp.float32(0)), x.shape, tile)
    write = elements.encode_integer if isinstance(element, Integer) else elements.encode
    code = write(scaled, element, random=random)
    code = jnp.where(expand(finite, x.shape, tile), code, jnp.uint8(0))
    scale = jnp.where(usable, scale, jnp.float32(0))
    return code, jnp.where(finite, scale, jnp.float32(jnp.nan)).astype(scale_dtype)


def values(
    code: jax.Array, scale: jax.Array, element: Element | Integer, tile: tuple[int, int] | None
) -> jax.Array:
    """Returns code * scale in float32, of code's shape."""
    read = elements.decode_integer if isinstance(element, Integer) else elements.decode
    return read(code, element) * expand(scale.astype(jnp.float32), code.shape, tile)


def reduce_max(x: jax.Array, scale_axes: int, tile: tuple[int, int] | None) -> jax.Array:
    """Returns the maxima (at least 0) of each tile of the last two axes, or over the axes after `scale_axes`."""
    if tile is None:
        return jnp.max(x, axis=tuple(range(scale_axes, x.ndim)), initial=0)
    rows, columns = tile
    pad = [(0, 0)] * x.ndim
    pad[-1] = (0, -x.shape[-1] % columns)
    if rows > 1:
        pad[-2] = (0, -x.shape[-2] % rows)
    x = jnp.pad(x, pad)
    x = jnp.max(x.reshape(*x.shape[:-1], x.shape[-1] // columns, columns), axis=-1, initial=0)
    if rows == 1:
        return x
    tiles = (*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1])
    return jnp.max(x.reshape(tiles), axis=-2, initial=0)


def expand(scale: jax.Array, shape: tuple[int, ...], tile: tuple[int, int] | None) -> jax.Array:
    """Repeats what `reduce_max` gave, up to axes of length 1 where a whole axis shares a scale."""
    if tile is None:
        return scale.reshape(scale.shape + (1,) * (len(shape) - scale.ndim))
    wide = scale.repeat(tile[1], axis=-1)[..., : shape[-1]]
    return wide if tile[0] == 1 else wide.repeat(tile[0], axis=-2)[..., : shape[-2], :]
