"""Products and tensors of the dense roles under a precision: projections, router, embedding, head, key-value cache.

T rows, K input width, N output width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import formats
from pallas_kernels.grouped_matmul import operands


def product(
    x: jax.Array,
    w_NK: jax.Array,
    precision: pallas_kernels.MatmulPrecision | None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns x w^T, [..., K] to [..., N] in the dtype of x, quantized where a precision says so.

    Args:
      x: float [..., K].
      w_NK: float32 parameters.
      precision: None multiplies in the dtype of x.
      key: for stochastic rounding of gradients.
    """
    if precision is None:
        return jax.lax.dot_general(x, w_NK.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
    x_TK = x.reshape(-1, x.shape[-1])
    y_TN = pallas_kernels.quantized_matmul(x_TK, w_NK, precision, key=key)
    return y_TN.reshape(*x.shape[:-1], -1)


def fold(key: jax.Array, number: int) -> jax.Array:
    """Returns the raw key data of a key of its own for each `number`."""
    typed = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.random.key_data(jax.random.fold_in(typed, number))


def rounded(
    x: jax.Array, format: str | None, rule: str | None = None, *, axis: int = -1
) -> jax.Array:
    """Returns x rounded to a format along an axis, each row with its own global scale, gradient straight-through.

    Args:
      x: float, any shape.
      format: key of formats.FORMATS; None returns x.
      rule: scale rule.
      axis: of the blocks.

    Returns:
      The shape and dtype of x.
    """
    if format is None:
        return x
    moved = jnp.moveaxis(jax.lax.stop_gradient(x), axis, -1)
    q = formats.quantize(moved, format, rule=rule, num_batch_axes=moved.ndim - 1)
    value = jnp.moveaxis(formats.dequantize(q, x.dtype), -1, axis)
    return operands.straight_through(x, value)


def rounded_matrix(w_NK: jax.Array, format: str | None, rule: str | None = None) -> jax.Array:
    """Returns a matrix rounded along its last axis, with one global scale, gradient straight-through."""
    if format is None:
        return w_NK
    q = formats.quantize(jax.lax.stop_gradient(w_NK), format, rule=rule, num_batch_axes=0)
    return operands.straight_through(w_NK, formats.dequantize(q))


def rounded_router(params: Any, width: int, format: str | None, rule: str | None = None) -> Any:
    """Returns a router's parameters with its matrices rounded, blocks along the model width where they have it first.

    Args:
      params: the router's parameters; those that are no matrices stay.
      width: of the model, the axis that a kernel contracts.
      format, rule: as in `rounded_matrix`.
    """
    if format is None:
        return params

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.ndim != 2:
            return leaf
        if leaf.shape[0] == width:
            return rounded_matrix(leaf.T, format, rule).T
        return rounded_matrix(leaf, format, rule)

    return jax.tree.map(one, params)
