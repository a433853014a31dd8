"""The arithmetic of the quantize kernel, on arrays in registers: a line of consecutive elements for each thread.

Bit for bit what `formats` does, in its order of operations. Rounding to nearest is the hardware's, to E2M1 and E4M3:
ties to even, saturating, the sign of zero kept. (The same by integer arithmetic, as `formats` does it, compiled to 145
registers instead of 96, and to 2321 instructions for a step of 64 elements a thread instead of 520.)

PTX for sm_100a shows `cvt.rn.satfinite.e2m1x2.f32` and `.e4m3x2.f32`, `div.rn.f32` and `rcp.rn.f32` (by
`private_division`: a plain division comes out as `div.full` or `rcp.approx`), no `ftz`, so subnormal numbers are kept,
and no `fma`: no product meets a sum that it could be contracted with.

L 128 lines, C columns of a line, B elements of a block.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import E2M1, E4M3, hadamard_matrix
from pallas_kernels.formats.elements import (
    E4M3_NAN,
    E8M0_NAN,
    e8m0_exponent,
    encode,
    reciprocal,
)
from pallas_kernels.formats.nvfp4 import _LARGEST_ENCODE as LARGEST_ENCODE
from pallas_kernels.formats.nvfp4 import _SMALLEST_STEP as SMALLEST_STEP
from pallas_kernels.private_division import ieee_divide

LINES = 128
VECTOR = 8  # elements that a register vector holds; 8 codes are a word
_NOT_FINITE = 0x7F800000
_HADAMARD = 16


def by_line(vector: int = VECTOR) -> plgpu.Layout:
    """Returns the layout of [L, C] in which thread l holds line l, in vectors of so many elements."""
    return plgpu.Layout.TCGEN05_TMEM_NATIVE(vector)


def per_line() -> plgpu.Layout:
    """Returns the layout of [L] in which thread l holds element l."""
    return by_line().reduce(1)


def spread(value_L: jax.Array, width: int) -> jax.Array:
    """Repeats a value per line: [L] -> [L, width]."""
    wide = lax.broadcast_in_dim(value_L, (LINES, width), (0,))
    return plgpu.layout_cast(wide, by_line())


def largest(x_LB: jax.Array) -> jax.Array:
    """Returns max |x| of each line's block, float32 [L]: infinity or NaN in a block that has one.

    Found among bits, which are ordered like magnitudes, NaN last; two elements an instruction where they have 16.
    """
    bits_LB = _bits(x_LB)
    magnitude_LB = bits_LB & jnp.iinfo(bits_LB.dtype).max
    largest_L = jnp.max(magnitude_LB, axis=1)
    return lax.bitcast_convert_type(largest_L, x_LB.dtype).astype(jnp.float32)


def is_finite(largest_L: jax.Array) -> jax.Array:
    """Whether a block with this `largest` has neither NaN nor infinity."""
    return _bits(largest_L) < jnp.int32(_NOT_FINITE)


def amax(largest_L: jax.Array) -> jax.Array:
    """Returns a block's largest magnitude, 0 where it is not finite."""
    return jnp.where(is_finite(largest_L), largest_L, jnp.float32(0))


def cleared(x_LB: jax.Array, finite_L: jax.Array) -> jax.Array:
    """Returns x, zeros in blocks that are not finite, in x's dtype."""
    bits_LB = _bits(x_LB)
    keep_L = jnp.where(finite_L, jnp.int32(-1), jnp.int32(0)).astype(bits_LB.dtype)
    return lax.bitcast_convert_type(bits_LB & spread(keep_L, x_LB.shape[1]), x_LB.dtype)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int16 if x.dtype.itemsize == 2 else jnp.int32)


def nvfp4_factors(global_amax_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what block maxima and scales are multiplied with: (encode / 6, decode), float32 [L]."""
    bound = jnp.float32(E2M1.max_value * E4M3.max_value)
    encode_L = ieee_divide(jnp.full_like(global_amax_L, bound), global_amax_L)
    usable_L = encode_L <= jnp.float32(LARGEST_ENCODE)
    decode_L = ieee_divide(None, jnp.where(usable_L, encode_L, jnp.float32(jnp.inf)))
    encode_L = jnp.where(usable_L, encode_L, jnp.float32(0))
    return encode_L * reciprocal(E2M1.max_value), decode_L


def nvfp4_scale(
    largest_L: jax.Array, encode_sixth_L: jax.Array, decode_L: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns a block's E4M3 byte, int32 [L], and the reciprocal of the step between codes of 1, float32 [L]."""
    ideal_L = jnp.minimum(amax(largest_L) * encode_sixth_L, jnp.float32(E4M3.max_value))
    scale_L = ideal_L.astype(jnp.float8_e4m3fn)
    step_L = scale_L.astype(jnp.float32) * decode_L
    usable_L = step_L >= jnp.float32(SMALLEST_STEP)
    byte_L = lax.bitcast_convert_type(scale_L, jnp.int8).astype(jnp.int32)
    byte_L = jnp.where(usable_L, byte_L, jnp.int32(0))
    factor_L = jnp.where(
        usable_L,
        ieee_divide(None, jnp.where(usable_L, step_L, jnp.float32(1))),
        jnp.float32(0),
    )
    return jnp.where(is_finite(largest_L), byte_L, jnp.int32(E4M3_NAN)), factor_L


def mxfp4_scale(largest_L: jax.Array, rule: str) -> tuple[jax.Array, jax.Array]:
    """Returns a block's E8M0 byte and its exponent, int32 [L] both."""
    exponent_L = e8m0_exponent(amax(largest_L), E2M1, rule)
    byte_L = exponent_L + jnp.int32(127)
    return jnp.where(is_finite(largest_L), byte_L, jnp.int32(E8M0_NAN)), exponent_L


def scaled(x_LB: jax.Array, factor_L: jax.Array) -> jax.Array:
    """Returns x * factor, float32."""
    return x_LB.astype(jnp.float32) * spread(factor_L, x_LB.shape[1])


def drawn(x_LB: jax.Array, exponent_L: jax.Array | None, random_LB: jax.Array) -> jax.Array:
    """Returns one of the two E2M1 values around x * 2^-exponent, as `formats.elements.encode` draws it.

    Args:
      x_LB: float32.
      exponent_L: int32, or None for 0.
      random_LB: int32 in [0, 2^16).
    """
    exponent = jnp.int32(0) if exponent_L is None else spread(exponent_L, x_LB.shape[1])
    code_LB = encode(x_LB, E2M1, exponent, random_LB).astype(jnp.int32)
    magnitude_LB = code_LB & jnp.int32(7)
    # Codes from 2 on are the upper bits of a float32 with another bias; 0 and 1 are 0 and 0.5.
    half = jnp.int32(126 << 23)
    bits_LB = jnp.where(
        magnitude_LB > jnp.int32(1), (magnitude_LB << 22) + half, magnitude_LB * half
    )
    return lax.bitcast_convert_type(bits_LB | (code_LB & jnp.int32(8)) << 28, jnp.float32)


def hadamard(x_LC: jax.Array) -> jax.Array:
    """Applies `formats.block_hadamard` with a block of 16 to each line, float32; sums go from first to last, as there.

    Rows of the matrix that begin alike share their partial sums: 170 additions for 16 elements.
    """
    x_LC = plgpu.layout_cast(x_LC.astype(jnp.float32), by_line(1))
    signs = hadamard_matrix(_HADAMARD)
    columns = []
    for first in range(0, x_LC.shape[1], _HADAMARD):
        sums = {(): None}
        for i in range(_HADAMARD):
            x_L1 = x_LC[:, first + i : first + i + 1]
            longer = {tuple(row[: i + 1]) for row in signs}
            sums = {begin: _plus(sums[begin[:-1]], x_L1, begin[-1]) for begin in sorted(longer)}
        columns += [sums[tuple(row)] * jnp.float32(_HADAMARD**-0.5) for row in signs]
    return plgpu.layout_cast(jnp.concatenate(columns, axis=1), by_line())


def _plus(total: jax.Array | None, x: jax.Array, sign: float) -> jax.Array:
    if total is None:
        return x  # the first column of the matrix is all ones
    return total + x if sign > 0 else total - x
