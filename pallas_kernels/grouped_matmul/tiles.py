"""Which tiles of rows a grouped kernel visits: computed by XLA beside the kernel, from group sizes that never leave it.

T rows sorted by expert, E experts, I tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """The tiles of rows of a grouped matmul, in the order of rows. Entries from `count` on are 0.

    Tile i covers rows block_I[i] * tile_rows + first_row_I[i] and the following rows_I[i] - 1, all of one expert.
    Blocks are aligned, since scales lie in tiles of 128 rows: a block that g groups share appears g times.

    Attributes:
      expert_I: int32, whose rows they are.
      block_I: int32, which block of tile_rows rows.
      first_row_I: int32, where in the block the expert's rows begin.
      rows_I: int32, how many they are, 1 to tile_rows.
      count: int32 scalar, how many tiles there are.
    """

    expert_I: jax.Array
    block_I: jax.Array
    first_row_I: jax.Array
    rows_I: jax.Array
    count: jax.Array


def most_tiles(num_experts: int, num_rows: int, tile_rows: int) -> int:
    """Returns the length of the schedule: as many tiles as any group sizes can need, at least 1."""
    return max(-(-num_rows // tile_rows) + min(num_experts, num_rows) - 1, 1)


def schedule(group_sizes_E: jax.Array, num_rows: int, tile_rows: int) -> Tiles:
    """Lays tiles over consecutive groups of rows: none for an empty group, none beyond the groups.

    Args:
      group_sizes_E: int32; groups end where the rows do, if their sizes say more.
      num_rows: T.
      tile_rows: rows of a block.

    Returns:
      Tiles of length `most_tiles(E, T, tile_rows)`, which does not depend on the sizes.

    Raises:
      ValueError: no experts, or tile_rows below 1.
    """
    num_experts = group_sizes_E.shape[0]
    if num_experts < 1 or tile_rows < 1:
        raise ValueError(
            f"schedule needs at least one expert and tile_rows of at least 1, "
            f"got {num_experts} and {tile_rows}"
        )
    end_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), num_rows)
    start_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
    first_E = start_E // tile_rows
    tiles_E = jnp.where(end_E > start_E, (end_E - 1) // tile_rows - first_E + 1, 0)
    end_tile_E = jnp.cumsum(tiles_E)
    i = jnp.arange(most_tiles(num_experts, num_rows, tile_rows), dtype=jnp.int32)
    # One comparison per pair instead of a search, which would be a loop of small kernels.
    expert_I = jnp.sum(end_tile_E[None, :] <= i[:, None], axis=1, dtype=jnp.int32)
    expert_I = jnp.minimum(expert_I, num_experts - 1)
    block_I = (first_E - end_tile_E + tiles_E)[expert_I] + i
    first_row_I = jnp.maximum(start_E[expert_I] - block_I * tile_rows, 0)
    stop_I = jnp.minimum(end_E[expert_I] - block_I * tile_rows, tile_rows)
    count = end_tile_E[-1]
    fields = (expert_I, block_I, first_row_I, stop_I - first_row_I)
    return Tiles(*(jnp.where(i < count, field, 0) for field in fields), count)
