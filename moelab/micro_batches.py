"""Micro-batches of a step under gradient accumulation: cut, run over, added up.

B sequences, L tokens each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moelab import moe


class MicroBatch(NamedTuple):
    """A micro-batch, or a stack of them.

    Attributes:
      batch: data.Batch.
      row_B: int32 places of its sequences in the step's batch.
      key: (2,) uint32 key data of the step's noise.
    """

    batch: Any
    row_B: jax.Array
    key: jax.Array


def cut(state, batch, count: int, num_devices: int) -> MicroBatch:
    """Stacks the step's micro-batches; the one of a step without accumulation is not stacked."""
    run_key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    key = jax.random.key_data(jax.random.fold_in(run_key, state.step))
    row_B = jnp.arange(batch.mask_BL.shape[0], dtype=jnp.int32)
    if count == 1:
        return MicroBatch(batch, row_B, key)
    cut = jax.tree.map(lambda a: split_batch(a, count, num_devices), (batch, row_B))
    return MicroBatch(*cut, jnp.broadcast_to(key, (count, *key.shape)))


def over_all(call, micros: MicroBatch, count: int):
    """Calls call(micro) -> (summed, rows) on every micro-batch; adds the first up, concatenates the second."""
    if count == 1:
        return call(micros)

    def body(total, micro):
        part, rows = call(micro)
        return jax.tree.map(jnp.add, total, part), rows

    shapes = jax.eval_shape(lambda m: call(jax.tree.map(lambda a: a[0], m))[0], micros)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    summed, rows = jax.lax.scan(body, zeros, micros)
    # (micro-batches, layers, tokens, ...) -> (layers, all tokens, ...)
    return summed, jax.tree.map(
        lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:]), rows
    )


def split_rows(reports: Any) -> tuple[Any, Any]:
    """Takes the rows and the trace out of the reports, the rest of which can be added up."""
    rows = tuple({k: r.rows for k, r in segment.items()} for segment in reports)
    rest = tuple(
        {k: r._replace(rows={}, trace=None) for k, r in segment.items()} for segment in reports
    )
    return rest, rows


def shared_out(reports: Any, share: jax.Array) -> Any:
    """Weighs what is a mean over tokens by the micro-batch's share of them, so that it can be added up."""

    def weighed(report: moe.LayerReport) -> moe.LayerReport:
        return report._replace(
            loss={name: value * share for name, value in report.loss.items()},
            weight={name: value * share for name, value in report.weight.items()},
            logit_norm=report.logit_norm * share,
            log_sum_exp=report.log_sum_exp * share,
        )

    return tuple({k: weighed(r) for k, r in segment.items()} for segment in reports)


def split_batch(array: jax.Array, count: int, num_devices: int) -> jax.Array:
    """Splits the batch axis into (count, batch / count), each micro-batch spread over all devices."""
    per_device = array.reshape(num_devices, count, -1, *array.shape[1:])
    return jnp.swapaxes(per_device, 0, 1).reshape(count, -1, *array.shape[1:])
