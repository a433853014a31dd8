"""The definition of the numerics: every expert computes every row, and a mask keeps the right ones.

For tests and small shapes: costs E times the work. Products and sums are float32; one cast at the end.
T rows, K contraction axis, N output axis, E experts, D model width, F expert width, G = 2F.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import formats
from pallas_kernels.grouped_matmul.activation import SWIGLU, SwiGLU
from pallas_kernels.grouped_matmul.precision import Bias, Weight


def grouped_matmul(
    x_TK: jax.Array,
    w_ENK: Weight,
    group_sizes_E: jax.Array,
    bias_EN: jax.Array | None,
    row_scale_T: jax.Array | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """y[t] = row_scale[t] * (w[e(t)] @ x[t]) + bias[e(t)], zero beyond the groups; packed weights get no gradient."""
    mine_ET = _mine(group_sizes_E, x_TK.shape[0])
    # Rows are masked before the product too: in its gradient 0 * NaN would be NaN.
    x_ETK = jnp.where(mine_ET[..., None], x_TK.astype(jnp.float32)[None], 0.0)
    y_ETN = _einsum("etk,enk->etn", x_ETK, _plain(w_ENK))
    if row_scale_T is not None:
        y_ETN = y_ETN * row_scale_T.astype(jnp.float32)[None, :, None]
    if bias_EN is not None:
        y_ETN = y_ETN + bias_EN.astype(jnp.float32)[:, None, :]
    return jnp.sum(jnp.where(mine_ET[..., None], y_ETN, 0.0), axis=0).astype(out_dtype)


def input_gradient(dy_TN: jax.Array, w_ENK: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """dx[t] = dy[t] @ w[e(t)], float32 (T, K), zero beyond the groups. Not differentiable on every backend."""
    mine_ET = _mine(group_sizes_E, dy_TN.shape[0])
    dy_ETN = jnp.where(mine_ET[..., None], dy_TN.astype(jnp.float32)[None], 0.0)
    return jnp.sum(_einsum("etn,enk->etk", dy_ETN, w_ENK.astype(jnp.float32)), axis=0)


def weight_gradient(dy_TN: jax.Array, x_TK: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """dw[e] = sum over the rows t of e of dy[t] x[t]^T, float32 (E, N, K), exactly zero for an empty group."""
    mine_ET = _mine(group_sizes_E, dy_TN.shape[0])
    dy_ETN = jnp.where(mine_ET[..., None], dy_TN.astype(jnp.float32)[None], 0.0)
    x_ETK = jnp.where(mine_ET[..., None], x_TK.astype(jnp.float32)[None], 0.0)
    return _einsum("etn,etk->enk", dy_ETN, x_ETK)


def expert_mlp(
    x_ND: jax.Array,
    gate_up_EGD: Weight,
    down_EDF: Weight,
    group_sizes_E: jax.Array,
    out_dtype: jnp.dtype,
    activation: SwiGLU = SWIGLU,
    bias: Bias = (None, None),
) -> jax.Array:
    """down(act([gate, up])): float32 hidden layer, what the activation makes of it cast to the dtype of x."""
    operands = (x_ND, gate_up_EGD, down_EDF, group_sizes_E, out_dtype, activation, bias)
    return composed(grouped_matmul, *operands)


def composed(
    product: Callable[..., jax.Array],
    x_ND: jax.Array,
    gate_up_EGD: Weight,
    down_EDF: Weight,
    group_sizes_E: jax.Array,
    out_dtype: jnp.dtype,
    activation: SwiGLU,
    bias: Bias,
) -> jax.Array:
    """As `expert_mlp`, with a backend's `grouped_matmul`."""
    hidden_NG = product(x_ND, gate_up_EGD, group_sizes_E, bias[0], None, jnp.float32)
    act_NF = activation(hidden_NG).astype(x_ND.dtype)
    return product(act_NF, down_EDF, group_sizes_E, bias[1], None, out_dtype)


def _plain(w_ENK: Weight) -> jax.Array:
    if isinstance(w_ENK, formats.BlockScaled):
        return jax.lax.stop_gradient(formats.dequantize(w_ENK))
    return w_ENK.astype(jnp.float32)


def _mine(group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """Which rows belong to which expert: bool (E, T)."""
    end_E = jnp.cumsum(group_sizes_E)
    row_1T = jnp.arange(num_rows)[None, :]
    return (row_1T < end_E[:, None]) & (row_1T >= (end_E - group_sizes_E)[:, None])


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)
