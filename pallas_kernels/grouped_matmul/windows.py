"""Cuts sorted rows into windows that belong to one expert each; what both window loops share.

An expert of r rows gets ceil(r / H) windows, H the largest height; each is computed at the smallest static height that
covers it. The rows by which a window is too tall belong to the next expert, whose own windows come later and overwrite
them, so nothing is padded and nothing has a capacity. After the last expert they are garbage: callers mask them.

N rows, E experts, M = N + H rows of a padded buffer, W windows (an upper bound), R rows of one window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats
from pallas_kernels.grouped_matmul.precision import Weight

# In sixteenths of the mean rows per expert: fine where balanced routing puts most experts, coarse elsewhere. Each
# height is compiled separately, so there are few.
_SIXTEENTHS = (4, 8, 11, 13, 15, 16, 17, 19, 24, 32)
_SMALL = (8, 16, 32, 64, 128, 256)
_SINGLE = 4  # mean rows up to which a row alone is worth a height of its own


class Windows(NamedTuple):
    """A schedule.

    Attributes:
      expert_W: int32 expert of each window.
      start_W: int32 first row.
      rows_W: int32 rows that belong to the expert.
      count: () int32, how many windows there are; entries beyond it mean nothing.
    """

    expert_W: jax.Array
    start_W: jax.Array
    rows_W: jax.Array
    count: jax.Array


def heights(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Returns the static window heights for N rows over E experts, ascending; the last one bounds the overrun.

    With few rows they are from half the mean to 4 times the mean (or to 256). However uneven the experts are, that
    makes at most E / 4 windows more than one for each; other heights would cost memory and compilation.
    """
    mean = num_rows / num_experts
    if few(num_rows, num_experts):
        candidates = tuple(height for height in _SMALL if height >= mean / 2)
        candidates = (1, *candidates) if mean <= _SINGLE else candidates
        enough = min(num_rows, 4 * mean)
    else:
        unit = min(64, 8 * -(-int(mean) // 128))
        candidates = tuple(unit * sixteenths for sixteenths in _SIXTEENTHS)
        enough = num_rows
    needed = [height for height in candidates if height < enough]
    return tuple(needed) + candidates[len(needed) : len(needed) + 1]


def few(num_rows: int, num_experts: int) -> bool:
    """Whether N rows are few for E experts: reading the weights costs about as much as multiplying."""
    return num_rows <= 128 * num_experts


def schedule(group_sizes_E: jax.Array, num_rows: int, height: int) -> Windows:
    """Returns the windows of groups that lie one after the other; their sizes sum to at most N."""
    num_experts = group_sizes_E.shape[0]
    windows_E = (group_sizes_E + height - 1) // height
    before_E = jnp.cumsum(windows_E) - windows_E
    first_row_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    bound = num_rows // height + num_experts
    window_W = jnp.arange(bound, dtype=jnp.int32)
    # The expert of window w is the last one that starts at or before it, and has windows: empty ones are passed over.
    expert_W = jnp.searchsorted(before_E + windows_E, window_W, side="right").astype(jnp.int32)
    expert_W = jnp.minimum(expert_W, num_experts - 1)
    offset_W = (window_W - before_E[expert_W]) * height
    rows_W = jnp.minimum(group_sizes_E[expert_W] - offset_W, height)
    return Windows(expert_W, first_row_E[expert_W] + offset_W, rows_W, jnp.sum(windows_E))


def run(
    windows: Windows,
    heights: tuple[int, ...],
    body: Callable,
    weights_of: Callable,
    buffers: tuple[jax.Array, ...],
    accumulators: tuple[jax.Array, ...] = (),
):
    """Loops over the windows, in order, as many as there are.

    Args:
      windows: from `schedule`.
      heights: static heights.
      body: (expert, start, mine_R1, weights, buffers) -> (buffers, additions) for one window of R rows; mine_R1 is
        False where a row belongs to the next expert.
      weights_of: expert -> weights, called once per window, outside the choice of a height.
      buffers: loop carries that body writes to in place.
      accumulators: arrays with a leading axis E; additions are added to the expert's entry.

    Returns:
      (buffers, accumulators).
    """

    def branch(height):
        def at_height(expert, start, rows, weights, buffers):
            mine_R1 = (jnp.arange(height, dtype=jnp.int32) < rows)[:, None]
            return body(expert, start, mine_R1, weights, buffers)

        return at_height

    branches = [branch(height) for height in heights]
    height_H = jnp.asarray(heights, jnp.int32)

    def step(i, carry):
        buffers, accumulators = carry
        expert, start, rows = windows.expert_W[i], windows.start_W[i], windows.rows_W[i]
        choice = jnp.sum((height_H < rows).astype(jnp.int32))
        buffers, additions = lax.switch(
            choice, branches, expert, start, rows, weights_of(expert), buffers
        )
        accumulators = tuple(
            lax.dynamic_update_index_in_dim(total, total[expert] + addition, expert, 0)
            for total, addition in zip(accumulators, additions, strict=True)
        )
        return buffers, accumulators

    return lax.fori_loop(0, windows.count, step, (buffers, accumulators))


def take(a: jax.Array, row_M: jax.Array, start: jax.Array, height: int) -> jax.Array:
    """Returns a[row_M[start : start + height]] in float32: gathers a window's rows, without a sorted copy of them."""
    row_R = lax.dynamic_slice(row_M, (start,), (height,))
    return a.at[row_R].get(mode="promise_in_bounds").astype(jnp.float32)


def put(buffer: jax.Array, value: jax.Array, start: jax.Array) -> jax.Array:
    """Writes a window's rows into a buffer, cast to its dtype."""
    return lax.dynamic_update_slice_in_dim(buffer, value.astype(buffer.dtype), start, 0)


def expert_weight(w: Weight, expert: jax.Array) -> jax.Array:
    """Returns one expert's (N, K) float32 weight, dequantized where it is packed."""
    w_NK = jax.tree.map(lambda leaf: leaf[expert], w)
    packed = isinstance(w, formats.BlockScaled)
    return formats.dequantize(w_NK) if packed else w_NK.astype(jnp.float32)


def transposed(w_NK: jax.Array) -> jax.Array:
    """Returns the (K, N) copy of an expert's weight.

    XLA's matmul packs a transposed operand slowly; copying the slice in this order costs no more than copying it as it
    is, if a barrier keeps the transposition out of the matmul.
    """
    return lax.optimization_barrier(w_NK.T)


def transposed_times(dy_RN: jax.Array, x_RK: jax.Array) -> jax.Array:
    """dy.T @ x: a window's share of a weight gradient, (N, K)."""
    return lax.dot_general(dy_RN, x_RK, (((0,), (0,)), ((), ())))


def zeros(shape: tuple[int, ...], dtype, like: tuple) -> jax.Array:
    """Zeros for a loop carry; they vary over the mesh axes that any of `like` varies over (see `vary_alike`)."""
    return _vary(jnp.zeros(shape, dtype), _varying(like))


def vary_alike(*trees):
    """Marks all arrays as varying over every mesh axis that one of them varies over.

    Inside `shard_map`, cotangents and loop carries must vary exactly as their primals. Done once, outside the custom
    gradients, so that the gradient of a replicated weight is summed over the devices by the transpose of the cast.
    """
    axes = _varying(trees)
    return jax.tree.map(lambda leaf: _vary(jnp.asarray(leaf), axes), trees)


def _varying(tree) -> frozenset[str]:
    axes = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree))
    return frozenset().union(*axes)


def _vary(a: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = sorted(axes - _varying(a))
    return lax.pcast(a, tuple(missing), to="varying") if missing else a
