"""Rows to the devices that hold their experts, and back: what expert parallelism adds between dispatch and experts.

Every device sorts its assignments by expert; the experts of device p are p*S .. (p+1)*S - 1, so the rows for each
device lie together. All devices know all counts (an all-gather of P x E integers), so every offset is computed and
nothing is negotiated. Received rows are regrouped by expert; the way back is the same exchange with its arguments
swapped, which is its gradient too.

P devices, E experts, S = E / P experts of a device, N assignments of a device, R rows that a device makes room for,
D model width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import device


class Exchange(NamedTuple):
    """Who sends how many rows where; integers only. Row and column of the (P, P) arrays: sender, receiver.

    Attributes:
      count_PP: rows sent.
      send_PP: where they begin among the sender's sorted rows.
      receive_PP: where they end up among the receiver's rows, which lie sender by sender.
      order_R: for each row grouped by expert, which received row it is; R where there is none.
      place_R: for each received row, its place when grouped by expert; R where there is none.
      sizes_S: rows of each of this device's experts.
      kept_N: whether a sorted row found room at its receiver.
    """

    count_PP: jax.Array
    send_PP: jax.Array
    receive_PP: jax.Array
    order_R: jax.Array
    place_R: jax.Array
    sizes_S: jax.Array
    kept_N: jax.Array


def room(num_assignments: int, num_devices: int, factor: float) -> int:
    """Returns R: ceil(factor * N), at most the P * N that can come; factor 0 makes room for all of them."""
    most = num_devices * num_assignments
    return most if not factor else min(most, -(-round(factor * num_assignments * 1e6) // 10**6))


def plan(sizes_E: jax.Array, num_assignments: int, rows: int, axis: str) -> Exchange:
    """Computes who sends what; inside `shard_map`.

    Args:
      sizes_E: int32, this device's assignments of every expert, in the order in which its rows are sorted.
      num_assignments: N.
      rows: R. What a device has no room for is not sent: of later senders first, of later experts first.
      axis: name of the mesh axis that experts are split over.
    """
    num_devices, me = lax.axis_size(axis), lax.axis_index(axis)
    own = sizes_E.shape[0] // num_devices
    wanted_PPS = lax.all_gather(sizes_E, axis).reshape(num_devices, num_devices, own)
    # Room at a receiver is given sender by sender, and expert by expert within one.
    arriving = jnp.swapaxes(wanted_PPS, 0, 1).reshape(num_devices, -1)
    before = jnp.cumsum(arriving, axis=1) - arriving
    arriving = jnp.clip(rows - before, 0, arriving)
    sent_PPS = jnp.swapaxes(arriving.reshape(num_devices, num_devices, own), 0, 1)
    count_PP = jnp.sum(sent_PPS, axis=2)
    wanted_PP = jnp.sum(wanted_PPS, axis=2)
    order_R, place_R = _regrouped(sent_PPS[:, me], rows)
    return Exchange(
        count_PP=count_PP,
        send_PP=jnp.cumsum(wanted_PP, axis=1) - wanted_PP,
        receive_PP=jnp.cumsum(count_PP, axis=0) - count_PP,
        order_R=order_R,
        place_R=place_R,
        sizes_S=jnp.sum(sent_PPS[:, me], axis=0),
        kept_N=_kept(sizes_E, sent_PPS[me].reshape(-1), num_assignments),
    )


def _regrouped(count_PS: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The permutation between rows that lie by (sender, expert) and by (expert, sender), both ways."""
    start_PS = _starts(count_PS)
    place_SP = _starts(count_PS.T)
    order_R = _moved(count_PS.T.reshape(-1), start_PS.T.reshape(-1), rows)
    place_R = _moved(count_PS.reshape(-1), place_SP.T.reshape(-1), rows)
    return order_R, place_R


def _starts(count: jax.Array) -> jax.Array:
    flat = count.reshape(-1)
    return (jnp.cumsum(flat) - flat).reshape(count.shape)


def _moved(count_G: jax.Array, start_G: jax.Array, rows: int) -> jax.Array:
    """For groups laid one after the other: where each row is if group g begins at start_G[g]; `rows` beyond them."""
    group_R, offset_R, exists_R = _member(_starts(count_G), count_G, rows)
    return jnp.where(exists_R, start_G[group_R] + offset_R, rows).astype(jnp.int32)


def _member(start_G: jax.Array, count_G: jax.Array, rows: int) -> tuple[jax.Array, ...]:
    """Each row's group, its offset in it, and whether it is in one; starts ascend, and there may be gaps."""
    row_R = jnp.arange(rows, dtype=jnp.int32)
    # The last group that starts here or before: an empty one is followed at once.
    group_R = jnp.maximum(jnp.searchsorted(start_G, row_R, side="right") - 1, 0)
    offset_R = row_R - start_G[group_R]
    return group_R, offset_R, (offset_R >= 0) & (offset_R < count_G[group_R])


def _kept(sizes_E: jax.Array, sent_E: jax.Array, num_assignments: int) -> jax.Array:
    """Whether each sorted row is sent: the first sent_E[e] rows of expert e are."""
    end_E = jnp.cumsum(sizes_E)
    row_N = jnp.arange(num_assignments, dtype=jnp.int32)
    expert_N = jnp.minimum(jnp.searchsorted(end_E, row_N, side="right"), sizes_E.shape[0] - 1)
    return (row_N < (end_E - sizes_E + sent_E)[expert_N]) & (row_N < end_E[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_experts(x_ND: jax.Array, exchange: Exchange, axis: str) -> jax.Array:
    """Sends sorted rows to the devices of their experts: (R, D), grouped by expert, zeros beyond."""
    received_RD = _ragged(
        x_ND,
        exchange.order_R.shape[0],
        exchange.count_PP,
        exchange.send_PP,
        exchange.receive_PP,
        axis,
    )
    return _rows_or_zero(received_RD, exchange.order_R)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_tokens(y_RD: jax.Array, exchange: Exchange, axis: str) -> jax.Array:
    """Sends the experts' rows back to where they came from: (N, D), sorted as they were, zeros where none was sent."""
    back_RD = _rows_or_zero(y_RD, exchange.place_R)
    arguments = (exchange.count_PP.T, exchange.receive_PP.T, exchange.send_PP.T, axis)
    return _ragged(back_RD, exchange.kept_N.shape[0], *arguments)


def _forward(function):
    def forward(a, exchange, axis):
        return function(a, exchange, axis), exchange

    return forward


def _backward(other):
    def backward(axis, exchange, gradient):
        return other(gradient, exchange, axis), None

    return backward


to_experts.defvjp(_forward(to_experts), _backward(to_tokens))
to_tokens.defvjp(_forward(to_tokens), _backward(to_experts))


def _ragged(a_MD, rows, count_PP, send_PP, receive_PP, axis) -> jax.Array:
    """The collective: `rows` rows, zeros where nobody sent any."""
    me = lax.axis_index(axis)
    if device.current().is_cuda:
        out_RD = lax.pcast(jnp.zeros((rows, a_MD.shape[1]), a_MD.dtype), (axis,), to="varying")
        sent, received = (send_PP[me], count_PP[me]), (receive_PP[me], count_PP[:, me])
        return lax.ragged_all_to_all(a_MD, out_RD, *sent, *received, axis_name=axis)
    # XLA's CPU has no ragged exchange: blocks of the largest size that a pair of devices can need.
    most = min(a_MD.shape[0], rows)
    slot_1M = jnp.arange(most, dtype=jnp.int32)[None, :]
    source_PM = jnp.minimum(send_PP[me][:, None] + slot_1M, a_MD.shape[0] - 1)
    blocks_PMD = lax.all_to_all(a_MD[source_PM], axis, 0, 0)
    sender_R, offset_R, exists_R = _member(receive_PP[:, me], count_PP[:, me], rows)
    taken_RD = blocks_PMD[sender_R, jnp.minimum(offset_R, most - 1)]
    return jnp.where(exists_R[:, None], taken_RD, jnp.zeros((), a_MD.dtype))


def _rows_or_zero(a_MD: jax.Array, row_R: jax.Array) -> jax.Array:
    """Rows by number; zeros for the number that means none, the length of row_R."""
    taken_RD = a_MD[jnp.minimum(row_R, a_MD.shape[0] - 1)]
    return jnp.where((row_R < row_R.shape[0])[:, None], taken_RD, jnp.zeros((), a_MD.dtype))
