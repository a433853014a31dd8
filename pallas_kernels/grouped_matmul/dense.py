"""A plain matmul as a backend of one group: what the rest of a model runs under a precision of its own.

T rows, K contraction axis, N output axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import formats


def grouped_matmul(x_TK, w_1NK, group_sizes_1, bias_1N, row_scale_T, out_dtype):
    """x w^T for the only group, which has all rows."""
    del group_sizes_1, bias_1N, row_scale_T
    packed = isinstance(w_1NK, formats.BlockScaled)
    w_1NK = jax.lax.stop_gradient(formats.dequantize(w_1NK)) if packed else w_1NK
    return _product(x_TK, w_1NK[0], 1, 1).astype(out_dtype)


def input_gradient(dy_TN, w_1NK, group_sizes_1):
    """dy w."""
    del group_sizes_1
    return _product(dy_TN, w_1NK[0], 1, 0)


def weight_gradient(dy_TN, x_TK, group_sizes_1):
    """dy^T x, of a group of one."""
    del group_sizes_1
    return _product(dy_TN, x_TK, 0, 0)[None]


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dimensions)
