"""The definition of the numerics: every expert computes every row, and a mask keeps the right ones.

For tests and small shapes: costs E times the work. Products and sums are float32; one cast at the end.
T rows, K contraction axis, N output axis, E experts, D model width, F expert width, G = 2F.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import formats
from pallas_kernels.grouped_matmul import precision as precision_lib
from pallas_kernels.grouped_matmul.precision import PLAIN, MatmulPrecision, Weight


def grouped_matmul(
    x_TK: jax.Array,
    w_ENK: Weight,
    group_sizes_E: jax.Array,
    bias_EN: jax.Array | None,
    row_scale_T: jax.Array | None,
    precision: MatmulPrecision,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """y[t] = row_scale[t] * (w[e(t)] @ x[t]) + bias[e(t)], zero beyond the groups; straight-through gradients."""
    w = _stop_packed(w_ENK)
    args = (group_sizes_E, bias_EN, row_scale_T)
    y_TN = _product(x_TK, w, *args)
    if precision.x is not None or precision.w is not None:
        valid_T = jnp.arange(x_TK.shape[0]) < jnp.sum(group_sizes_E)
        q_TK = precision_lib.quantize_rows(x_TK, precision, valid_T)
        # The value of the quantized product with the gradient of the plain one: the difference is exactly 0.
        quantized_TN = _product(q_TK, _weights(w_ENK, precision), *args)
        y_TN = jax.lax.stop_gradient(quantized_TN) + (y_TN - jax.lax.stop_gradient(y_TN))
    return y_TN.astype(out_dtype)


def expert_mlp(
    x_ND: jax.Array,
    gate_up_EGD: Weight,
    down_EDF: Weight,
    group_sizes_E: jax.Array,
    precision: MatmulPrecision,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """down(silu(gate) * up), by `compose_expert_mlp`."""
    return compose_expert_mlp(
        grouped_matmul, x_ND, gate_up_EGD, down_EDF, group_sizes_E, precision, out_dtype
    )


def compose_expert_mlp(matmul, x_ND, gate_up, down, group_sizes_E, precision, out_dtype):
    """The feed-forward as two calls of a backend's grouped matmul: float32 hidden layer, cast to x's dtype for down."""
    hidden_NG = matmul(x_ND, gate_up, group_sizes_E, None, None, precision, jnp.dtype(jnp.float32))
    gate_NF, up_NF = jnp.split(hidden_NG, 2, axis=-1)
    act_NF = (jax.nn.silu(gate_NF) * up_NF).astype(x_ND.dtype)
    return matmul(act_NF, down, group_sizes_E, None, None, precision, out_dtype)


def _weights(w_ENK: Weight, precision: MatmulPrecision) -> jax.Array:
    """All experts' float32 weights as the forward product sees them."""
    experts = [precision_lib.expert_weight(w_ENK, e, precision) for e in range(w_ENK.shape[0])]
    return jnp.stack(experts)


def _stop_packed(w_ENK: Weight) -> jax.Array:
    """Float32 weights of the gradient: plain ones with a gradient, packed ones dequantized and without."""
    w = _weights(w_ENK, PLAIN)
    return jax.lax.stop_gradient(w) if isinstance(w_ENK, formats.BlockScaled) else w


def _product(x_TK, w_ENK, group_sizes_E, bias_EN, row_scale_T):
    end_E = jnp.cumsum(group_sizes_E)
    row_1T = jnp.arange(x_TK.shape[0])[None, :]
    mine_ET = (row_1T < end_E[:, None]) & (row_1T >= (end_E - group_sizes_E)[:, None])
    # Rows are masked before the product too: in its gradient 0 * NaN would be NaN.
    x_ETK = jnp.where(mine_ET[..., None], x_TK.astype(jnp.float32)[None], 0.0)
    y_ETN = jnp.einsum("etk,enk->etn", x_ETK, w_ENK, precision=jax.lax.Precision.HIGHEST)
    if row_scale_T is not None:
        y_ETN = y_ETN * row_scale_T.astype(jnp.float32)[None, :, None]
    if bias_EN is not None:
        y_ETN = y_ETN + bias_EN.astype(jnp.float32)[:, None, :]
    return jnp.sum(jnp.where(mine_ET[..., None], y_ETN, 0.0), axis=0)
