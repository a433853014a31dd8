"""`jax.lax.ragged_dot`, what several JAX toolkits call: the default for plain operands on a GPU, elsewhere to compare.

On CPU it computes every expert for every row: 5 to 19 times the cost of the equal dense matmul. Plain operands only.
T rows, K contraction axis, N output axis, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import device, formats
from pallas_kernels.grouped_matmul import operands, reference, windows
from pallas_kernels.grouped_matmul.activation import SWIGLU


def grouped_matmul(x_TK, w_ENK, group_sizes_E, bias_EN, row_scale_T, out_dtype):
    """As `reference.grouped_matmul`, for plain operands; bfloat16 ones are multiplied as they are on a GPU."""
    if isinstance(w_ENK, formats.BlockScaled):
        raise NotImplementedError("ragged_dot takes plain weights only; use xla_windows")
    inside_T = jnp.arange(x_TK.shape[0]) < jnp.sum(group_sizes_E)
    # XLA's CPU rounds bfloat16 products; a GPU sums them in float32.
    same = x_TK.dtype == w_ENK.dtype and device.current().is_cuda
    dtype = x_TK.dtype if same else jnp.dtype(jnp.float32)
    # Masked on both sides: the tail must be zero and must not reach the weight gradient.
    x_TK = jnp.where(inside_T[:, None], x_TK.astype(dtype), jnp.zeros((), dtype))
    w_EKN = jnp.swapaxes(w_ENK.astype(dtype), 1, 2)
    y_TN = jax.lax.ragged_dot(x_TK, w_EKN, group_sizes_E, preferred_element_type=jnp.float32)
    if row_scale_T is not None:
        y_TN = y_TN * row_scale_T.astype(jnp.float32)[:, None]
    if bias_EN is not None:
        y_TN = operands.plus_bias(y_TN, bias_EN, group_sizes_E, weight_gradient)
    return jnp.where(inside_T[:, None], y_TN, 0.0).astype(out_dtype)


def input_gradient(dy_TN, w_ENK, group_sizes_E):
    """As `reference.input_gradient`."""
    w_EKN = jnp.swapaxes(w_ENK, 1, 2)
    return grouped_matmul(dy_TN, w_EKN, group_sizes_E, None, None, jnp.float32)


def weight_gradient(dy_TN, x_TK, group_sizes_E):
    """As `reference.weight_gradient`, from the derivative of the product, which is linear in the weights."""
    shape = (group_sizes_E.shape[0], dy_TN.shape[1], x_TK.shape[1])

    def product(w_ENK):
        return grouped_matmul(x_TK, w_ENK, group_sizes_E, None, None, jnp.float32)

    # Zeros of each device's own: the gradient of what all devices share would be summed over them.
    zeros_ENK = windows.zeros(shape, jnp.float32, (dy_TN, x_TK, group_sizes_E))
    return jax.vjp(product, zeros_ENK)[1](dy_TN.astype(jnp.float32))[0]


def expert_mlp(
    x_ND,
    gate_up_EGD,
    down_EDF,
    group_sizes_E,
    out_dtype,
    activation=SWIGLU,
    bias=(None, None),
):
    """As `reference.expert_mlp`, for plain operands."""
    operands_ = (x_ND, gate_up_EGD, down_EDF, group_sizes_E, out_dtype, activation, bias)
    return reference.composed(grouped_matmul, *operands_)
