"""How codes and scales lie in memory: two 4-bit codes a byte, and the 128x4 tiles of scales that tensor cores read.

R rows, C columns (one scale per block of the contraction axis).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ROWS, _COLUMNS = 128, 4  # of one tile of scales


def pack(code: jax.Array) -> jax.Array:
    """Packs 4-bit codes two a byte, element 2i in the low nibble.

    Args:
      code: uint8 [..., K] with values 0 to 15, K even.

    Returns:
      uint8 [..., K / 2].

    Raises:
      ValueError: if K is odd.
    """
    if code.shape[-1] % 2:
        raise ValueError(f"pack needs an even last axis, got shape {code.shape}")
    pair = code.reshape(*code.shape[:-1], code.shape[-1] // 2, 2)
    return pair[..., 0] | (pair[..., 1] << 4)


def unpack(packed: jax.Array) -> jax.Array:
    """Returns the 4-bit codes of packed bytes: uint8 [..., K / 2] -> uint8 [..., K]."""
    pair = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return pair.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def swizzle(scale_RC: jax.Array) -> jax.Array:
    """Arranges block scales in the 128x4 tiles of cuBLAS and tcgen05.

    Scale (r, c) lands at byte ((r // 128) * ceil(C / 4) + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4.

    Args:
      scale_RC: uint8 [..., R, C], E4M3 or E8M0; padded here with zeros to multiples of 128 and 4. Leading axes are
        kept, so that experts stay apart, each padded to whole tiles.

    Returns:
      uint8 [..., ceil(R / 128), ceil(C / 4), 32, 16], the shape that Mosaic GPU copies into tensor memory.
    """
    rows, columns = scale_RC.shape[-2:]
    lead = scale_RC.shape[:-2]
    pad = [(0, 0)] * len(lead) + [(0, -rows % _ROWS), (0, -columns % _COLUMNS)]
    tile = jnp.pad(scale_RC, pad).reshape(
        *lead, -(-rows // _ROWS), 4, 32, -(-columns // _COLUMNS), 4
    )
    tile = jnp.swapaxes(tile, -4, -2)  # (R/128, C/4, row % 32, row // 32, c % 4)
    return tile.reshape(*tile.shape[:-2], 16)


def unswizzle(tile: jax.Array, rows: int, columns: int) -> jax.Array:
    """Inverts `swizzle`: uint8 [..., ceil(R / 128), ceil(C / 4), 32, 16] -> [..., R, C].

    Raises:
      ValueError: if the tiles cannot be those of `rows` by `columns` scales.
    """
    expected = (-(-rows // _ROWS), -(-columns // _COLUMNS), 32, 16)
    if tile.shape[-4:] != expected:
        raise ValueError(
            f"swizzled scales of {rows} rows and {columns} columns have the shape {expected}, got {tile.shape}"
        )
    scale = jnp.swapaxes(tile.reshape(*tile.shape[:-1], 4, 4), -4, -2)
    scale = scale.reshape(*tile.shape[:-4], expected[0] * _ROWS, expected[1] * _COLUMNS)
    return scale[..., :rows, :columns]
