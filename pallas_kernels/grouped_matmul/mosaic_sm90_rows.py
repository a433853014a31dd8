"""Rows of x as the Hopper kernel reads them, and which of them each tile multiplies.

Copies into swizzled shared memory begin at multiples of 8 rows. Each group is put at one, so that its tiles begin with
it: a group of up to tile_n rows has one tile, and its weights are read and decoded once. (`tiles.schedule` aligns tiles
to blocks of all rows, as tensor-core scales need; a group across two blocks has two.)

T rows sorted by expert, P rows of aligned groups, K contraction axis, E experts, I tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGNMENT = 8


class RowTiles(NamedTuple):
    """The tiles in the order of rows. Entries from `count` on have 0 rows.

    Attributes:
      expert_I: int32, whose rows they are.
      row_I: int32, the first one among T.
      aligned_I: int32, the first one among P.
      rows_I: int32, how many they are, 1 to tile_n.
      count: int32 scalar, how many tiles there are.
    """

    expert_I: jax.Array
    row_I: jax.Array
    aligned_I: jax.Array
    rows_I: jax.Array
    count: jax.Array


class _Groups(NamedTuple):
    """First row and end of each group among T, and its first row among P."""

    start_E: jax.Array
    end_E: jax.Array
    aligned_E: jax.Array


def _groups(group_sizes_E: jax.Array, num_rows: int) -> _Groups:
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), num_rows)
    start_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
    space_E = -(-(end_E - start_E) // ALIGNMENT) * ALIGNMENT
    return _Groups(start_E, end_E, jnp.cumsum(space_E) - space_E)


def row_tiles(group_sizes_E: jax.Array, num_rows: int, tile_n: int) -> RowTiles:
    """Cuts each group into tiles of tile_n rows and a rest, without reading the sizes on the host.

    Args:
      group_sizes_E: int32; groups end where the rows do, if their sizes say more.
      num_rows: T.
      tile_n: rows of a tile, a multiple of 8.

    Returns:
      RowTiles of length T // tile_n + min(E, T), which does not depend on the sizes.
    """
    num_experts = group_sizes_E.shape[0]
    start_E, end_E, aligned_E = _groups(group_sizes_E, num_rows)
    tiles_E = -(-(end_E - start_E) // tile_n)
    end_tile_E = jnp.cumsum(tiles_E)
    i = jnp.arange(num_rows // tile_n + min(num_experts, num_rows), dtype=jnp.int32)
    expert_I = _last_at_or_before(end_tile_E - tiles_E, i)
    done_I = (i - (end_tile_E - tiles_E)[expert_I]) * tile_n
    row_I = start_E[expert_I] + done_I
    rows_I = jnp.minimum(end_E[expert_I] - row_I, tile_n)
    fields = (expert_I, row_I, aligned_E[expert_I] + done_I, rows_I)
    count = end_tile_E[-1]
    return RowTiles(*(jnp.where(i < count, field, 0) for field in fields), count)


def aligned(x_TK: jax.Array, group_sizes_E: jax.Array, least: int) -> jax.Array:
    """Puts each group at a multiple of 8 rows: (P, K). Rows in between are copies of any row, not zeros.

    Args:
      x_TK: rows sorted by expert.
      group_sizes_E: int32.
      least: P is at least that.
    """
    num_rows, num_experts = x_TK.shape[0], group_sizes_E.shape[0]
    groups = _groups(group_sizes_E, num_rows)
    most = num_rows + (ALIGNMENT - 1) * min(num_experts, num_rows)
    row_P = jnp.arange(max(most, least), dtype=jnp.int32)
    expert_P = _last_at_or_before(groups.aligned_E, row_P)
    source_P = row_P + (groups.start_E - groups.aligned_E)[expert_P]
    return x_TK.at[source_P].get(mode="clip")


def _last_at_or_before(first_E: jax.Array, place: jax.Array) -> jax.Array:
    """Returns the last group that begins at a place or before: the one that has it, since an empty one is followed.

    One comparison per pair instead of a search, which would be a loop of small kernels.
    """
    return jnp.sum(first_E[None, :] <= place[:, None], axis=1, dtype=jnp.int32) - 1
