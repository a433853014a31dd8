"""Decodes 4-bit weights in the registers of a Hopper warpgroup: words of four codes to bfloat16, exactly.

A 16-bit word holds the codes of four neighbours along K, the first in its low bits. A thread takes the same code j of
every word, so that two words in one 32-bit register become two bfloat16 in one register and nothing is shuffled. The
matrix of the codes j has column c where K has element 4c + j, and x comes in that order (`interleaved`).

E2M1 is s, e, m: with e and m put where bfloat16 has its lowest exponent bits and its highest mantissa bit, over an
exponent of 124, a code reads v = 2^(e - 3) (1 + m/2), a quarter of its value where e > 0. Where e = 0 the value is
m/2 instead of (1 + m/2) / 2, and min(v, 2v - 1/4) is a quarter of the value for all eight. No subnormal number occurs,
which a CPU would flush in interpret mode.

M weight rows of a warpgroup, C words of a row, T rows of x, K contraction axis.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

CODES = 4  # of a word
FRACTION = 0.25  # what decoded values are of the true ones; the epilogue makes up for it

_MAGNITUDE, _EXPONENT, _SIGN = 0x01C0, 0x3E00, 0x8000


def shifts(code: int) -> tuple[int, int]:
    """Returns how far left a word is shifted to put the magnitude of its code j in place, and its sign."""
    return 6 - 4 * code, 12 - 4 * code


def interleaved(x_TK: jax.Array, tile_k: int) -> jax.Array:
    """Puts column k = tile + 4c + j of x at tile + j * tile_k / 4 + c: (T, K), a transposition within each step."""
    num_rows, depth = x_TK.shape
    x = x_TK.reshape(num_rows, depth // tile_k, tile_k // CODES, CODES)
    return jnp.swapaxes(x, 2, 3).reshape(num_rows, depth)


def words(codes: jax.Array) -> jax.Array:
    """Returns packed codes as words: uint8 [..., K / 2] -> uint16 [..., K / 4]. No byte moves."""
    pair = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return lax.bitcast_convert_type(pair, jnp.uint16)


def values(word_MC: jax.Array, code: int, scale_MC: jax.Array, *, interpreted: bool) -> jax.Array:
    """Returns FRACTION times the values of code `code` of each word: bfloat16 (M, C).

    Args:
      word_MC: uint16.
      code: 0 to 3.
      scale_MC: bfloat16 block scales.
      interpreted: whether this runs in interpret mode, which has no `fields_in_pairs`.
    """
    fields = fields_of_words if interpreted else fields_in_pairs
    magnitude_MC, sign_MC = fields(word_MC, code)
    v_MC = lax.bitcast_convert_type(magnitude_MC, jnp.bfloat16)
    v_MC = jnp.minimum(v_MC, v_MC * jnp.bfloat16(2) - jnp.bfloat16(0.25))
    v_MC = lax.bitcast_convert_type(v_MC, jnp.uint16) | sign_MC
    return lax.bitcast_convert_type(v_MC, jnp.bfloat16) * scale_MC


def fields_of_words(word_MC: jax.Array, code: int) -> tuple[jax.Array, jax.Array]:
    """Returns magnitude and sign of a code of each word as bits of a bfloat16: uint16 (M, C) each."""
    found = []
    for shift, mask in zip(shifts(code), (_MAGNITUDE, _SIGN), strict=True):
        move = jnp.left_shift if shift >= 0 else jnp.right_shift
        found.append(move(word_MC, jnp.uint16(abs(shift))) & jnp.uint16(mask))
    return found[0] | jnp.uint16(_EXPONENT), found[1]


def fields_in_pairs(word_MC: jax.Array, code: int) -> tuple[jax.Array, jax.Array]:
    """Does the same on the 32-bit registers that hold two words: the compiler would shift each word by itself.

    Bits that cross from one word into the other are masked out. As numbers: `fields_of_pair`.
    """
    kind = plgpu.ShapeDtypeStruct(word_MC.shape, jnp.uint16, layout=plgpu.Layout.WGMMA)
    inline = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=(kind, kind))
    return inline(lambda _, word: _fields_of_registers(word, code))(word_MC)


def fields_of_pair(pair, code: int, shift, constant):
    """Returns magnitude and sign of a code of two words in 32 bits, on whatever has & and |.

    Args:
      pair: 32 bits, without sign.
      code: 0 to 3.
      shift: (pair, n) -> pair shifted left by n, or right without sign by -n.
      constant: makes an operand of a number.
    """
    both = 0x10001
    left, sign_left = shifts(code)
    magnitude = (shift(pair, left) & constant(_MAGNITUDE * both)) | constant(_EXPONENT * both)
    return magnitude, shift(pair, sign_left) & constant(_SIGN * both)


def _fields_of_registers(word, code: int):
    """`fields_of_pair` on Mosaic's registers, each a vector of two uint16."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32 = ir.IntegerType.get_signless(32)
    pair_type = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))

    def constant(number):
        number = number - 2**32 if number >= 2**31 else number
        return arith.constant(i32, ir.IntegerAttr.get(i32, number))

    class Bits:
        """Bits of a register, with operators."""

        def __init__(self, value):
            self.value = value

        def __and__(self, other):
            return Bits(arith.andi(self.value, other))

        def __or__(self, other):
            return Bits(arith.ori(self.value, other))

    def shift(bits, by):
        op = arith.shli if by > 0 else arith.shrui
        return Bits(op(bits.value, constant(abs(by)))) if by else bits

    magnitudes, signs = np.empty_like(word.registers), np.empty_like(word.registers)
    for index, register in np.ndenumerate(word.registers):
        found = fields_of_pair(Bits(utils.bitcast(register, i32)), code, shift, constant)
        magnitudes[index], signs[index] = (utils.bitcast(b.value, pair_type) for b in found)
    return tuple(
        mgpu.FragmentedArray(_registers=registers, _layout=word.layout, _is_signed=False)
        for registers in (magnitudes, signs)
    )


def scales(scale_BM, num_words: int, block: int) -> jax.Array:
    """Spreads the scales of one step over the words that they belong to: bfloat16 (M, C).

    Args:
      scale_BM: reference to shared memory, (blocks of a step, M): float8_e4m3fn, or uint8 with E8M0 bits.
      num_words: C.
      block: codes that share a scale, 16 or 32.
    """
    rows = scale_BM.shape[1]

    def spread(index):
        return lax.broadcast_in_dim(_decoded(scale_BM[index]), (rows, 8), (0,))

    per_eight = 8 * CODES // block  # scales of eight words, the width of a tile of registers
    if per_eight == 1:
        parts = [spread(i) for i in range(num_words // 8)]
    else:
        left = lax.broadcasted_iota(jnp.int32, (rows, 8), 1) < 4
        parts = [jnp.where(left, spread(2 * i), spread(2 * i + 1)) for i in range(num_words // 8)]
    return jnp.concatenate(parts, axis=1)


def _decoded(scale_M: jax.Array) -> jax.Array:
    """Returns block scales as bfloat16, exactly; a NaN (E8M0: infinity, which is NaN times the zero codes below it)."""
    if scale_M.dtype == jnp.float8_e4m3fn:
        # By way of float16: the newest ptxas is given a direct conversion that sm_90 does not have.
        return scale_M.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)
    # 2^(byte - 127): the byte is bfloat16's exponent, and 0 its only subnormal.
    bits_M = jnp.maximum(scale_M.astype(jnp.uint16) << jnp.uint16(7), jnp.uint16(0x40))
    return lax.bitcast_convert_type(bits_M, jnp.bfloat16)
