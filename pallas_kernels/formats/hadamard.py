"""Block Hadamard transforms along the contraction axis, which spread outliers over a block before quantization.

Both operands of a product, transformed with the same signs, have the same product: (x R) (w R)^T = x w^T.

K contraction axis, B block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCKS = (16, 32, 64, 128)


@functools.cache
def hadamard_matrix(block: int) -> np.ndarray:
    """Returns Sylvester's matrix [B, B] of +-1 in float32, symmetric, with H H = B I: (-1)^popcount(i & j).

    Args:
      block: one of BLOCKS.

    Raises:
      ValueError: another block.
    """
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block!r}")
    index = np.arange(block)
    matrix = 1 - 2 * (np.bitwise_count(index[:, None] & index) & 1).astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def random_signs(key: jax.Array, length: int) -> jax.Array:
    """Draws int8 signs, 1 or -1: [length], for `block_hadamard`."""
    return 1 - 2 * jax.random.bernoulli(key, shape=(length,)).astype(jnp.int8)


def block_hadamard(x: jax.Array, block: int, *, signs: jax.Array | None = None) -> jax.Array:
    """Applies the orthonormal transform y = (x * signs) H / sqrt(B) to each block of the last axis.

    Args:
      x: floating point [..., K], K a multiple of the block.
      block: one of BLOCKS.
      signs: None, or int8 of 1 and -1: [B], the same in every block, or [K]. `random_signs` draws them.

    Returns:
      float32 [..., K], whatever x's dtype: it is meant to be quantized next.

    Raises:
      ValueError: a block, shape, dtype or signs that do not fit.

    Reference: arXiv:2509.25149, section 4.2, where B = 16 and the signs are fixed; arXiv:2509.23202.
    """
    signs_K = _check(x, block, signs)
    x = x.astype(jnp.float32)
    return _transform(x if signs_K is None else x * signs_K, block)


def inverse_block_hadamard(
    y: jax.Array, block: int, *, signs: jax.Array | None = None
) -> jax.Array:
    """Inverts `block_hadamard`: x = (y H / sqrt(B)) * signs, float32. H is its own inverse; the signs come last.

    For B = 16 and 64, 1 / sqrt(B) is a power of two, and the two are exact inverses where no sum rounds.
    """
    signs_K = _check(y, block, signs)
    x = _transform(y.astype(jnp.float32), block)
    return x if signs_K is None else x * signs_K


def _transform(x: jax.Array, block: int) -> jax.Array:
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    # Unscaled and then scaled, so that the products are exact: TF32 or bfloat16 passes would round x.
    y = jnp.matmul(blocks, jnp.asarray(hadamard_matrix(block)), precision=lax.Precision.HIGHEST)
    return (y * jnp.float32(block**-0.5)).reshape(x.shape)


def _check(x: jax.Array, block: int, signs: jax.Array | None) -> jax.Array | None:
    """Checks the operands; returns the signs in float32, of x's number of axes."""
    hadamard_matrix(block)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"x needs float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] % block:
        raise ValueError(f"x needs a last axis that is a multiple of {block}, got shape {x.shape}")
    if signs is None:
        return None
    length = x.shape[-1]
    if signs.dtype != jnp.int8 or signs.shape not in ((block,), (length,)):
        raise ValueError(
            f"signs must be int8 of shape ({block},) or ({length},), got {signs.dtype} of shape {signs.shape}"
        )
    signs_K = jnp.tile(signs, length // signs.shape[0]) if length else signs[:0]
    return signs_K.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (length,))
