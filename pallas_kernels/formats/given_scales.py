"""Codes under scales that are already fixed, and scales from chosen block maxima: for searches and for GPTQ.

The order of operations is that of `quantize`, so that the same scales give the same codes:

    NVFP4: code = e2m1(x * (1 / (scale * decode))),  value = (code * scale) * (amax * (1 / (6 * bound)))
    MX:    code = element(x * 2^-e),                 value = code * 2^e

K contraction axis, N rows, B blocks along K.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import elements, layout, nvfp4
from pallas_kernels.formats.block_scaled import BlockScaled
from pallas_kernels.formats.elements import E2M1, E4M3, E4M3_NAN, E8M0_NAN
from pallas_kernels.formats.table import FORMATS, Format


def quantize_with(x: jax.Array, like: BlockScaled) -> BlockScaled:
    """Quantizes x to the nearest codes under the scales and the global amax of another array.

    `quantize_with(x, quantize(x, format))` is `quantize(x, format)`, bit for bit.

    Args:
      x: float32, bfloat16 or float16, of like's shape. Computed in float32. What lies above a block's largest value
        saturates.
      like: any BlockScaled with byte scales; its codes are not read.

    Returns:
      BlockScaled of like's format and rule. A block that is not finite in x gets a NaN scale and zero codes, and so
      does one whose scale is NaN in `like`; zero scales of NVFP4 stay, with codes +-0.

    Raises:
      ValueError: a format with float scales, or x of another shape or dtype.
    """
    spec = _byte_format(like.format)
    _check_dtype("x", x)
    if x.shape != like.shape:
        raise ValueError(f"x must have the shape of like, {like.shape}, got {x.shape}")
    return _quantize_with(x.astype(jnp.float32), like, spec)


def nearest(
    x: jax.Array, scale: jax.Array, global_amax: jax.Array | None, format: str
) -> jax.Array:
    """Rounds each element to the nearest value that it can have under a scale of its own.

    GPTQ's step on a column: x [N], and scale the N scales of the blocks that the column crosses. The same value as
    `dequantize(quantize_with(...))` has there.

    Args:
      x: float32, any shape.
      scale: uint8, broadcastable to x: the scale's byte of each element.
      global_amax: float32, of x's leading axes (NVFP4), or None (MX).
      format: key of FORMATS with byte scales.

    Returns:
      float32 of x's shape; NaN below a NaN scale.

    Raises:
      ValueError: a format with float scales.
    """
    spec = _byte_format(format)
    code = _codes(x, scale, global_amax, spec)
    value = elements.decode(code, spec.element)
    if spec.scale == "e8m0":
        return elements.multiply_by_e8m0(value, scale)
    step = global_amax * elements.reciprocal(E2M1.max_value * spec.scale_bound)
    return (value * elements.decode(scale, E4M3)) * _trailing(step, x.ndim)


def scales_for(
    amax: jax.Array,
    global_amax: jax.Array | None,
    format: str,
    rule: str | None = None,
) -> jax.Array:
    """Returns the scale bytes that `quantize` gives to blocks of these maxima.

    The maxima may be chosen: smaller than a block's own they clip, larger ones (1.5 times, Four Over Six) leave room.

    Args:
      amax: float32 [..., N, B], at least 0. For the 2D formats equal in the 16 rows of a tile. A maximum that is not
        finite gives a NaN scale.
      global_amax: float32, of amax's leading axes (NVFP4), or None (MX).
      format: key of FORMATS with byte scales.
      rule: of MX formats; None is the format's first. In Four Over Six the maximum is mapped to 6, whatever the rule.

    Returns:
      uint8 of amax's shape.

    Raises:
      ValueError: a format with float scales, an unknown rule, or a global amax that is missing or must not be there.
    """
    spec = _byte_format(format)
    rule = spec.rules[0] if rule is None else rule
    if rule not in spec.rules:
        raise ValueError(
            f"unknown rule {rule!r} for format {format}; allowed: {', '.join(spec.rules)}"
        )
    if (global_amax is None) != (spec.scale == "e8m0"):
        wanted = "None" if spec.scale == "e8m0" else "an array"
        raise ValueError(f"global_amax must be {wanted} for format {format}, got {global_amax!r}")
    return _scales_for(amax, global_amax, spec, rule)


@functools.partial(jax.jit, static_argnums=2)
def _quantize_with(x: jax.Array, like: BlockScaled, spec: Format) -> BlockScaled:
    blocks = x.reshape(*like.scales.shape, spec.block)
    finite = jnp.all(jnp.isfinite(blocks), axis=-1)
    if spec.block_rows > 1:
        rows, columns = finite.shape[-2:]
        tiles = finite.reshape(*finite.shape[:-2], rows // spec.block_rows, -1, columns)
        finite = jnp.all(tiles, axis=-2).repeat(spec.block_rows, axis=-2)
    nan = _nan(spec)
    scale = jnp.where(finite, like.scales, jnp.uint8(nan))
    code = _codes(blocks, scale[..., None], like.global_amax, spec)
    code = jnp.where((scale == nan)[..., None], jnp.uint8(0), code).reshape(x.shape)
    stored = layout.pack(code) if spec.element.bits == 4 else code
    stored, scale = lax.optimization_barrier((stored, scale))  # see block_scaled
    return BlockScaled(stored, scale, like.global_amax, like.format, like.rule)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scales_for(
    amax: jax.Array, global_amax: jax.Array | None, spec: Format, rule: str
) -> jax.Array:
    finite = jnp.isfinite(amax)
    amax = jnp.where(finite, amax, jnp.float32(0))
    if spec.scale == "e8m0":
        scale = (elements.e8m0_exponent(amax, spec.element, rule) + 127).astype(jnp.uint8)
    else:
        encode, decode = _global_factors(global_amax, spec, amax.ndim)
        if "amax" in spec.rules:
            ideal = amax * (encode * elements.reciprocal(E2M1.max_value))
        else:  # Four Over Six divides first
            ideal = elements.divide(amax, E2M1.max_value) * encode
        scale, _ = nvfp4._scale(ideal, decode)
    return jnp.where(finite, scale, jnp.uint8(_nan(spec)))


def _codes(
    x: jax.Array, scale: jax.Array, global_amax: jax.Array | None, spec: Format
) -> jax.Array:
    """Returns the codes of x's elements, one a byte, under scales broadcastable to x."""
    if spec.scale == "e8m0":
        code = elements.encode(x, spec.element, scale.astype(jnp.int32) - 127)
    else:
        _, decode = _global_factors(global_amax, spec, x.ndim)
        # A scale that is on the grid stays as it is; one below the smallest step counts as zero.
        _, reciprocal = nvfp4._scale(elements.decode(scale, E4M3), decode)
        code = elements.encode(x * reciprocal, E2M1)
    return lax.optimization_barrier(code)


def _global_factors(global_amax: jax.Array, spec: Format, ndim: int) -> tuple[jax.Array, jax.Array]:
    """Returns 6 * bound / amax and its reciprocal with trailing axes of length 1; 0 where the array counts as zero."""
    encode = jnp.float32(E2M1.max_value * spec.scale_bound) / global_amax
    usable = encode <= jnp.float32(nvfp4._LARGEST_ENCODE)
    decode = 1 / jnp.where(usable, encode, jnp.float32(jnp.inf))  # the select: see nvfp4
    encode = jnp.where(usable, encode, jnp.float32(0))
    return _trailing(encode, ndim), _trailing(decode, ndim)


def _trailing(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _nan(spec: Format) -> int:
    return E8M0_NAN if spec.scale == "e8m0" else E4M3_NAN


def _check_dtype(name: str, x: jax.Array) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{name} needs float32, bfloat16 or float16, got {x.dtype}")


def _byte_format(format: str) -> Format:
    allowed = [name for name, spec in FORMATS.items() if not spec.float_scales]
    if format not in allowed:
        raise ValueError(f"format {format!r} has no byte scales; allowed: {', '.join(allowed)}")
    return FORMATS[format]
