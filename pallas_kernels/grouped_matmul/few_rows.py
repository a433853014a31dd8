"""One expert's weight times few rows: the weight stands on the left, and is taken piece by piece.

While an expert has few rows, the time goes into its weight. So that is read once, as it lies: a transposed copy, which
makes the product with many rows fast, would cost several times this one. Packed weights are decoded a piece of output
rows at a time, into a buffer that stays in the cache: no expert exists in float32, however large. Decoding is exact
and builds no float32 subnormals; only sums are rounded, in another order than the reference's.

The two codes of a byte are decoded into two arrays, and the input is split alike, into even and odd columns:
interleaving them again costs more than the product.

E experts, N output axis, K contraction axis, H = K / 2 bytes of a row, J blocks of a row, C = H / J bytes of a block,
B output rows of a piece, R rows of a window, D model width, F expert width, G = 2F.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats
from pallas_kernels.formats import elements
from pallas_kernels.grouped_matmul import windows
from pallas_kernels.grouped_matmul.precision import Weight

_PIECE_BYTES = 2**20  # of a decoded piece
_PIECE_SHARE = 1 / 32  # of the float32 weights of all experts, at most
_FEWEST = 64  # output rows of a piece: below, starting a product costs more than computing it

# A code's bits as float16, E2M1's fields at the top of float16's, stand for 2^-14 times its value: 15 - 1 of bias.
_BIAS = 14


def feed_forward(
    x_RD: jax.Array, gate_up: Weight, down: Weight, expert: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns down (silu(gate) * up) of one expert and [gate, up], both float32; the product is cast to dtype between.

    Args:
      x_RD: float32.
      gate_up: (E, 2F, D), plain or packed.
      down: (E, D, F) likewise.
      expert: () int32.
      dtype: of the activations.
    """
    hidden_GR = _product(gate_up, expert, _turned(x_RD))
    gate_FR, up_FR = jnp.split(hidden_GR, 2)
    act_FR = (jax.nn.silu(gate_FR) * up_FR).astype(dtype).astype(jnp.float32)
    return _turned(_product(down, expert, act_FR)), _turned(hidden_GR)


def times(x_RK: jax.Array, w: Weight, expert: jax.Array) -> jax.Array:
    """Returns x w[expert]^T in float32.

    Args:
      x_RK: float32.
      w: (E, N, K), plain or packed.
      expert: () int32.
    """
    return _turned(_product(w, expert, _turned(x_RK)))


def _turned(a: jax.Array) -> jax.Array:
    """The transposed array, in memory too: XLA would make its matmul read one side across."""
    return lax.optimization_barrier(a.T)


def _product(w: Weight, expert: jax.Array, x_KR: jax.Array) -> jax.Array:
    """w[expert] x, (N, R)."""
    if not isinstance(w, formats.BlockScaled):
        piece = _plain_piece
    elif formats.FORMATS[w.format].element is formats.E2M1 and w.layout == "linear":
        piece = _packed_piece
    else:  # other scales are not cut by rows
        w, expert, piece = windows.expert_weight(w, expert)[None], jnp.int32(0), _plain_piece
    num_experts, width, depth = w.shape
    rows = _rows_of_a_piece(num_experts, width, depth)
    if rows == width:
        return piece(w, expert, 0, rows, x_KR)

    def step(i, y_NR):
        # The last piece may overlap the one before it, and then computes the same again.
        start = jnp.minimum(i * rows, width - rows)
        y_BR = piece(w, expert, start, rows, x_KR)
        return lax.dynamic_update_slice_in_dim(y_NR, y_BR, start, 0)

    y_NR = windows.zeros((width, x_KR.shape[1]), jnp.float32, (w, expert, x_KR))
    return lax.fori_loop(0, -(-width // rows), step, y_NR)


def _rows_of_a_piece(num_experts: int, width: int, depth: int) -> int:
    in_cache = _PIECE_BYTES // (4 * max(depth, 1))
    share = int(num_experts * width * _PIECE_SHARE)
    return min(width, max(_FEWEST, min(in_cache, share)))


def _plain_piece(w_ENK, expert, start, rows: int, x_KR):
    return _cut(w_ENK, expert, start, rows).astype(jnp.float32) @ x_KR


def _packed_piece(w: formats.BlockScaled, expert, start, rows: int, x_KR):
    byte_BH = _cut(w.codes, expert, start, rows).astype(jnp.uint16)
    scale_BJ = _cut(w.scales, expert, start, rows)
    byte_BJC = byte_BH.reshape(*scale_BJ.shape, byte_BH.shape[1] // max(scale_BJ.shape[1], 1))
    low = (byte_BJC & 0x07) << 9 | (byte_BJC & 0x08) << 12
    high = (byte_BJC & 0x70) << 5 | (byte_BJC & 0x80) << 8
    factors = lax.optimization_barrier(_factors(scale_BJ, formats.FORMATS[w.format]))

    def values(half_BJC):
        value = lax.bitcast_convert_type(half_BJC, jnp.float16).astype(jnp.float32)
        for factor_BJ in factors:
            value = value * factor_BJ[:, :, None]
        return value.reshape(byte_BH.shape)

    low_BH, high_BH = lax.optimization_barrier((values(low), values(high)))
    y_BR = low_BH @ x_KR[0::2] + high_BH @ x_KR[1::2]
    return y_BR if w.global_amax is None else y_BR * _step(w, expert)


def _cut(a: jax.Array, expert: jax.Array, start: jax.Array | int, rows: int) -> jax.Array:
    """a[expert, start : start + rows]."""
    return lax.dynamic_slice(a, (expert, start, 0), (1, rows, a.shape[2]))[0]


def _factors(scale_BJ: jax.Array, spec: formats.Format) -> tuple[jax.Array, ...]:
    """The factors that turn a block's float16 values into code * scale, exactly."""
    if spec.scale == "e4m3":
        return (elements.decode(scale_BJ, elements.E4M3) * jnp.float32(2.0**_BIAS),)
    # Two, as in multiply_by_e8m0: 2^-127 is a subnormal, and 2^127 * 2^14 is infinite.
    exponent = scale_BJ.astype(jnp.int32) - 127
    first = exponent >> 1
    rest = elements.power_of_two(exponent - first)
    rest = jnp.where(scale_BJ == elements.E8M0_NAN, jnp.float32(jnp.nan), rest)
    return elements.power_of_two(first + _BIAS), rest


def _step(w: formats.BlockScaled, expert: jax.Array) -> jax.Array:
    """The expert's global scale, as `formats.dequantize` computes it."""
    bound = formats.E2M1.max_value * formats.FORMATS[w.format].scale_bound
    return w.global_amax[expert] * elements.reciprocal(bound)
