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


def swizzle_groups(
    scale_RC: jax.Array, group_sizes_E: jax.Array, align: int = _ROWS
) -> tuple[jax.Array, jax.Array]:
    """Arranges the scales of consecutive groups of rows, each group padded with zeros to whole tiles of its own.

    Tensor cores read scales by whole tiles: without the padding, a group would read those of its neighbour.

    Args:
      scale_RC: uint8 [R, C].
      group_sizes_E: int32, rows of each group; rows beyond their sum are left out.
      align: rows that a group is padded to a multiple of; itself a multiple of 128.

    Returns:
      (tiles, first_tile_E). tiles: uint8 [M, ceil(C / 4), 32, 16] with M the most tiles that E groups of R rows can
      fill, so that it does not depend on the sizes; those not needed are zero. first_tile_E: int32, where each group
      begins.

    Raises:
      ValueError: if the array has not two axes, or align is no multiple of 128.
    """
    if scale_RC.ndim != 2:
        raise ValueError(f"swizzle_groups needs scales [rows, columns], got {scale_RC.shape}")
    rows, groups = scale_RC.shape[0], group_sizes_E.shape[0]
    start_E, end_E, first_E = _groups(group_sizes_E, rows, align)
    most = (rows + (align - 1) * min(groups, rows)) // align * align
    padded = jnp.arange(most, dtype=jnp.int32)
    # The last group that begins here or before: the one that has rows, since an empty one is followed at once.
    group = jnp.searchsorted(first_E, padded, side="right").astype(jnp.int32) - 1
    source = start_E[group] + padded - first_E[group]
    valid = source < end_E[group]
    found = scale_RC[jnp.where(valid, source, 0)] if rows else jnp.zeros_like(scale_RC)
    found = jnp.where(valid[:, None], found, jnp.zeros((), scale_RC.dtype))
    return swizzle(found), first_E // _ROWS


def unswizzle_groups(
    tiles: jax.Array, group_sizes_E: jax.Array, rows: int, columns: int, align: int = _ROWS
) -> jax.Array:
    """Inverts `swizzle_groups`: uint8 [rows, columns], zero in rows that belong to no group."""
    start_E, end_E, first_E = _groups(group_sizes_E, rows, align)
    scale = unswizzle(tiles, tiles.shape[-4] * _ROWS, columns)
    row = jnp.arange(rows, dtype=jnp.int32)
    group = jnp.searchsorted(end_E, row, side="right").astype(jnp.int32)
    inside = group < end_E.shape[0]
    group = jnp.where(inside, group, 0)
    source = jnp.where(inside, first_E[group] + row - start_E[group], 0)
    return jnp.where(inside[:, None], scale[source], jnp.zeros((), scale.dtype))


def _groups(
    group_sizes_E: jax.Array, rows: int, align: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each group's first row and end among the rows, and its first row when padded."""
    if align <= 0 or align % _ROWS:
        raise ValueError(f"align must be a positive multiple of {_ROWS}, got {align}")
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), rows)
    start_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
    padded_E = -(-(end_E - start_E) // align) * align
    return start_E, end_E, jnp.cumsum(padded_E) - padded_E
