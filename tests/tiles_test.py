"""The tile schedule against a plain loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import tiles

_TILE = 4
_schedule = jax.jit(tiles.schedule, static_argnums=(1, 2))


def _by_hand(sizes, num_rows, tile_rows):
    """(expert, block, first row in the block, rows) of each tile."""
    found, start = [], 0
    for expert, size in enumerate(sizes):
        end = min(start + size, num_rows)
        row = start
        while row < end:
            block = row // tile_rows
            stop = min(end, (block + 1) * tile_rows)
            found.append((expert, block, row - block * tile_rows, stop - row))
            row = stop
        start = end
    return found


def _check(sizes, num_rows, tile_rows=_TILE):
    got = jax.device_get(_schedule(jnp.asarray(sizes, jnp.int32), num_rows, tile_rows))
    expected = _by_hand(sizes, num_rows, tile_rows)
    assert got.count == len(expected)
    rows = np.stack(got[:4], axis=1)
    assert rows.dtype == np.int32
    assert [tuple(row) for row in rows[: got.count]] == expected
    assert not rows[got.count :].any()


@pytest.mark.parametrize("slack", [0, 3])
def test_every_pattern_of_empty_groups(slack):
    sizes = np.random.default_rng(0).integers(1, 10, 8)
    for pattern in itertools.product([0, 1], repeat=8):
        _check([int(s) for s in sizes * pattern], int(sizes.sum()) + slack)


@pytest.mark.parametrize(
    "sizes, num_rows",
    [
        ([1, 0, 0], 1),
        ([0, 0, 1], 1),
        ([0, 0, 1], 9),
        ([0, 0, 0], 0),
        ([0], 0),
        ([0, 0], 7),
        ([8, 4], 12),  # aligned: no block is shared
        ([3, 1, 4], 8),
        ([1] * 9, 9),
        ([5, 9, 3], 10),  # more than there are rows
        ([20], 10),
    ],
)
def test_ragged(sizes, num_rows):
    _check(sizes, num_rows)


def test_worst_case_fills_the_schedule():
    """A group that ends one row into a block costs a tile more: T / tile + E - 1."""
    sizes = [5, 8, 8, 3]
    _check(sizes, 24)
    assert len(_by_hand(sizes, 24, _TILE)) == tiles.most_tiles(4, 24, _TILE) == 9


def test_random_sizes():
    rng = np.random.default_rng(1)
    for _ in range(50):
        sizes = rng.multinomial(rng.integers(0, 41), rng.dirichlet(np.full(5, 0.3)))
        _check([int(s) for s in sizes], 40)


def test_refuses():
    with pytest.raises(ValueError, match="at least one expert"):
        tiles.schedule(jnp.zeros(0, jnp.int32), 4, 4)
    with pytest.raises(ValueError, match="tile_rows"):
        tiles.schedule(jnp.zeros(2, jnp.int32), 4, 0)
