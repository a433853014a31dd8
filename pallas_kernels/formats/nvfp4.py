"""Codes and scales of NVFP4 blocks: the nearest scale, and Four Over Six by squared or absolute error.

The order of operations is that of Transformer Engine's `NVFP4QuantizerRef`, for Four Over Six too, whose candidates'
errors it sums one element after the other, and over the rows of a 16 x 16 tile in a tree.

B blocks of the last axis, N rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats import elements
from pallas_kernels.formats.elements import E2M1, E4M3

_LARGEST_ENCODE = 2.0**126  # above, its reciprocal is subnormal: the tensor counts as zero
_SMALLEST_STEP = 2.0**-124  # so that float32-subnormal inputs encode to 0, flushed or not


def codes_and_scales(
    blocks: jax.Array,
    amax: jax.Array,
    global_amax: jax.Array,
    *,
    bound: float,
    rule: str,
    block_rows: int,
    random: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes blocks under given maxima.

    Args:
      blocks: float32 [..., N, B, 16].
      amax: float32 [..., N, B], each block's maximum (equal in the rows of a tile).
      global_amax: float32, of the leading axes.
      bound: largest scale that the global scale aims at.
      rule: "amax"; or "mse" or "mae", Four Over Six by that error.
      block_rows: rows that share a scale, and so a choice between 4 and 6.
      random: None, or random bits of the blocks' shape. Four Over Six then chooses as if rounding to nearest: a choice
        by the error of the draws would favour draws close to the input, which is a bias.

    Returns:
      E2M1 codes [..., N, B, 16], E4M3 scale bytes [..., N, B].
    """
    encode = jnp.float32(E2M1.max_value * bound) / global_amax
    usable = encode <= jnp.float32(_LARGEST_ENCODE)
    # XLA turns 1 / (c / amax) into amax * (1 / c), which differs for a third of all amax: a select between hides it.
    decode = 1 / jnp.where(usable, encode, jnp.float32(jnp.inf))
    encode = jnp.where(usable, encode, jnp.float32(0))
    tail = (1,) * (amax.ndim - global_amax.ndim)
    encode, decode = (g.reshape(g.shape + tail) for g in (encode, decode))
    if rule == "amax":
        ideal = amax * (encode * elements.reciprocal(E2M1.max_value))
        scale, reciprocal = _scale(ideal, decode)
        return _codes(blocks, reciprocal, random), scale
    # 4/6: the same block with its largest value at 4 instead of 6. A tie keeps 6.
    ideal = elements.divide(amax, E2M1.max_value) * encode
    six, four = _scale(ideal, decode), _scale(ideal * jnp.float32(1.5), decode)
    code_6, code_4 = _codes(blocks, six[1], None), _codes(blocks, four[1], None)
    # In units of a power of two near the global amax, which changes no rounding: squares neither over- nor underflow.
    exponent = lax.bitcast_convert_type(global_amax, jnp.int32) >> 23
    unit = elements.power_of_two(128 - jnp.maximum(exponent, 1))
    largest = (global_amax * unit).reshape(global_amax.shape + tail)
    wanted = blocks * unit.reshape(unit.shape + tail)[..., None]
    error_6 = _error(wanted, code_6, six[0], largest, bound, rule, block_rows)
    error_4 = _error(wanted, code_4, four[0], largest, bound, rule, block_rows)
    use_4 = lax.optimization_barrier(error_4 < error_6)
    if block_rows > 1:
        use_4 = use_4.repeat(block_rows, axis=-2)
    scale = jnp.where(use_4, four[0], six[0])
    if random is None:
        return jnp.where(use_4[..., None], code_4, code_6), scale
    return _codes(blocks, jnp.where(use_4, four[1], six[1]), random), scale


def _scale(ideal: jax.Array, decode: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns E4M3 scales for unrounded ones, and the reciprocals of the steps between codes of 1."""
    scale = elements.encode(ideal, E4M3)
    step = elements.decode(scale, E4M3) * decode
    usable = step >= jnp.float32(_SMALLEST_STEP)
    scale = jnp.where(usable, scale, jnp.uint8(0))
    # A reciprocal and a product: XLA rewrites a division of the block by its step, eagerly or not.
    return lax.optimization_barrier((scale, jnp.where(usable, 1 / step, jnp.float32(0))))


def _codes(blocks: jax.Array, reciprocal: jax.Array, random: jax.Array | None) -> jax.Array:
    code = elements.encode(blocks * reciprocal[..., None], E2M1, random=random)
    return lax.optimization_barrier(code)


def _error(
    wanted: jax.Array,
    code: jax.Array,
    scale: jax.Array,
    largest: jax.Array,
    bound: float,
    rule: str,
    block_rows: int,
) -> jax.Array:
    """Returns the summed error of blocks [..., N, B], or of tiles [..., N / 16, B].

    The minimum keeps a compiler from contracting a square and a sum into one rounding.
    """
    value = elements.decode(code, E2M1) * elements.decode(scale, E4M3)[..., None]  # exact
    difference = elements.divide(value * largest[..., None], E2M1.max_value * bound) - wanted
    if rule == "mae":
        error = jnp.abs(difference)
    else:
        error = jnp.minimum(difference * difference, jnp.float32(np.finfo(np.float32).max))
    total = error[..., 0]
    for element in range(1, error.shape[-1]):
        total = total + error[..., element]
    if block_rows == 1:
        return total
    *lead, rows, columns = total.shape
    total = total.reshape(*lead, rows // block_rows, block_rows, columns)
    while total.shape[-2] > 1:
        half = total.shape[-2] // 2
        total = total[..., :half, :] + total[..., half:, :]
    return total[..., 0, :]
