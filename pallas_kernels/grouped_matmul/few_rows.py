"""One expert's weight times few rows: the weight stands on the left, and is taken piece by piece.

While an expert has few rows, the time goes into its weight. So that is read once, as it lies: a transposed copy, which
makes the product with many rows fast, would cost several times this one. Packed weights are decoded a piece of output
rows at a time, into a buffer that stays in the cache: no expert exists in float32, however large. Decoding is exact
and builds no float32 subnormals; only sums are rounded, in another order than the reference's.

The two codes of a byte are decoded into two arrays, and the input is split alike, into even and odd columns:
interleaving them again costs more than the product. A single row is multiplied while its weights are decoded.

E experts, N output axis, K contraction axis, H = K / 2 bytes of a row, J blocks of a row, C = H / J bytes of a block,
S shares of a row's blocks, P partial sums of a row, B output rows of a piece, R rows of a window, D model width,
F expert width, G = 2F.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats
from pallas_kernels.formats import elements
from pallas_kernels.grouped_matmul import windows
from pallas_kernels.grouped_matmul.precision import Weight

_PIECE_BYTES = {True: 2**21, False: 2**20}  # of a piece in float32, packed or not
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
    packed = isinstance(w, formats.BlockScaled)
    if packed and not _is_cut_by_rows(w):
        w, expert, packed = windows.expert_weight(w, expert)[None], jnp.int32(0), False
    piece = _packed_piece if packed else _plain_piece
    width, columns = w.shape[1], x_KR.shape[1]
    rows = _rows_of_a_piece(w.shape, packed, columns)
    if rows == width:
        return piece(w, expert, 0, rows, x_KR)

    def step(i, y_NR):
        # The last piece may overlap the one before it, and then computes the same again.
        start = jnp.minimum(i * rows, width - rows)
        y_BR = piece(w, expert, start, rows, x_KR)
        return lax.dynamic_update_slice_in_dim(y_NR, y_BR, start, 0)

    y_NR = windows.zeros((width, x_KR.shape[1]), jnp.float32, (w, expert, x_KR))
    return lax.fori_loop(0, -(-width // rows), step, y_NR)


def _is_cut_by_rows(w: formats.BlockScaled) -> bool:
    """Whether any rows of a weight are decoded alone: not so where rows share a scale, or scales lie in tiles."""
    return formats.FORMATS[w.format].element is formats.E2M1 and w.layout == "linear"


def _rows_of_a_piece(shape: tuple[int, int, int], packed: bool, columns: int) -> int:
    """Output rows to compute at a time; fewer than all of them where a loop is faster than what it repeats.

    That is so for plain weights. And XLA compiles a loop around a product with one vector into one function, which
    decodes in a quarter of the time that it takes outside: but a loop of one piece is no loop.
    """
    num_experts, width, depth = shape
    in_cache = _PIECE_BYTES[packed] // (4 * max(depth, 1))
    rows = min(width, max(_FEWEST, min(in_cache, int(num_experts * width * _PIECE_SHARE))))
    return rows if packed and columns > 1 else min(rows, -(-width // 2))


def _plain_piece(w_ENK, expert, start, rows: int, x_KR):
    return _cut(w_ENK, expert, start, rows).astype(jnp.float32) @ x_KR


def _packed_piece(w: formats.BlockScaled, expert, start, rows: int, x_KR):
    byte_BH = _cut(w.codes, expert, start, rows).astype(jnp.uint16)
    scale_BJ = _cut(w.scales, expert, start, rows)
    # Once for a block, not for each of its codes.
    factors = lax.optimization_barrier(_factors(scale_BJ, formats.FORMATS[w.format]))
    product = _row_product if x_KR.shape[1] == 1 else _rows_product
    y_BR = product(byte_BH, factors, x_KR)
    return y_BR if w.global_amax is None else y_BR * _step(w, expert)


def _rows_product(byte_BH: jax.Array, factors: tuple[jax.Array, ...], x_KR: jax.Array) -> jax.Array:
    """Decodes both halves, and multiplies."""
    shape_BJC = (*factors[0].shape, byte_BH.shape[1] // max(factors[0].shape[1], 1))

    def decoded(half_BJC):
        return _scaled(half_BJC, factors).reshape(byte_BH.shape)

    low_BH, high_BH = map(decoded, _halves(byte_BH.reshape(shape_BJC)))
    low_BH, high_BH = lax.optimization_barrier((low_BH, high_BH))
    return low_BH @ x_KR[0::2] + high_BH @ x_KR[1::2]


def _row_product(byte_BH: jax.Array, factors: tuple[jax.Array, ...], x_K1: jax.Array) -> jax.Array:
    """Multiplies while decoding: of a row's products only partial sums are written, an eighth as many as weights."""
    blocks = factors[0].shape[1]
    shares = next(n for n in (4, 2, 1) if blocks % n == 0)
    rest = (shares, blocks // shares, byte_BH.shape[1] // max(blocks, 1))
    byte_BSJC = byte_BH.reshape(byte_BH.shape[0], *rest)
    factors_BSJ = [factor.reshape(-1, *rest[:2]) for factor in factors]
    even_SJC, odd_SJC = (x_K1[first::2, 0].reshape(rest) for first in (0, 1))

    def partial(share):
        low_BJC, high_BJC = _halves(byte_BSJC[:, share])
        sums_BJC = low_BJC * even_SJC[None, share] + high_BJC * odd_SJC[None, share]
        return _scaled(sums_BJC, [factor[:, share] for factor in factors_BSJ])

    sums_BJC = functools.reduce(jnp.add, map(partial, range(shares)))
    sums_BP = lax.optimization_barrier(sums_BJC.reshape(sums_BJC.shape[0], -1))
    # The sum of a row, by a product: XLA adds up in sequence.
    return sums_BP @ jnp.ones((sums_BP.shape[1], 1))


def _halves(byte: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 values of the low and the high codes of uint16 bytes, times 2^-14."""
    low = (byte & 0x07) << 9 | (byte & 0x08) << 12
    high = (byte & 0x70) << 5 | (byte & 0x80) << 8
    as_float = lambda bits: lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)  # noqa: E731
    return as_float(low), as_float(high)


def _scaled(value_BJC: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    for factor_BJ in factors:
        value_BJC = value_BJC * factor_BJ[:, :, None]
    return value_BJC


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
