"""The grouped matmul as a loop over windows of the sorted rows: the default on CPU.

Work follows the rows, not the number of experts: `windows.py`. float32 products and sums.
T rows, M rows of a padded buffer, K contraction axis, N output axis, E experts, R rows of a window.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import formats
from pallas_kernels.grouped_matmul import expert_windows, few_rows, reference, windows
from pallas_kernels.grouped_matmul.activation import SWIGLU, SwiGLU
from pallas_kernels.grouped_matmul.precision import Bias


def grouped_matmul(x_TK, w_ENK, group_sizes_E, bias_EN, row_scale_T, out_dtype):
    """As `reference.grouped_matmul`, at a cost that follows the rows."""
    if x_TK.shape[0] == 0:
        return jnp.zeros((0, w_ENK.shape[1]), out_dtype)
    operands = windows.vary_alike(x_TK, w_ENK, group_sizes_E, bias_EN, row_scale_T)
    return _grouped_matmul(*operands, jnp.dtype(out_dtype))


def expert_mlp(
    x_ND,
    gate_up_EGD,
    down_EDF,
    group_sizes_E,
    out_dtype,
    activation=SWIGLU,
    bias=(None, None),
):
    """As `reference.expert_mlp`: all three matmuls in one window, so the hidden layer is not written in a forward.

    With biases, or another activation than SwiGLU, two loops and the hidden layer between them.
    """
    if not fuses(activation, bias):
        operands = (x_ND, gate_up_EGD, down_EDF, group_sizes_E, out_dtype, activation, bias)
        return reference.composed(grouped_matmul, *operands)
    return expert_windows.expert_mlp(x_ND, gate_up_EGD, down_EDF, group_sizes_E, out_dtype)


def fuses(activation: SwiGLU, bias: Bias) -> bool:
    """Whether a feed-forward fits in one window's loop: its activation is SwiGLU, and it has no bias."""
    return activation == SWIGLU and bias == (None, None)


def input_gradient(dy_TN, w_ENK, group_sizes_E):
    """As `reference.input_gradient`."""

    def body(expert, start, mine_R1, w_NK, buffers):
        dy_RN = windows.take(dy_TN, row_M, start, mine_R1.shape[0])
        return (windows.put(buffers[0], dy_RN @ w_NK, start),), ()

    num_rows, like = dy_TN.shape[0], (dy_TN, w_ENK, group_sizes_E)
    heights = windows.heights(num_rows, w_ENK.shape[0])
    row_M = _row_index(num_rows, heights)
    schedule = windows.schedule(group_sizes_E, num_rows, heights[-1])
    buffer = windows.zeros((num_rows + heights[-1], w_ENK.shape[2]), jnp.float32, like)
    weights = lambda expert: w_ENK[expert].astype(jnp.float32)  # noqa: E731
    (dx_MK,), _ = windows.run(schedule, heights, body, weights, (buffer,))
    inside_T = jnp.arange(num_rows) < jnp.sum(group_sizes_E)
    return jnp.where(inside_T[:, None], dx_MK[:num_rows], 0)


def weight_gradient(dy_TN, x_TK, group_sizes_E):
    """As `reference.weight_gradient`."""

    def body(expert, start, mine_R1, weights, buffers):
        # Rows of the next expert, or of nobody, are cut by where: 0 * NaN is NaN.
        x_RK = jnp.where(mine_R1, windows.take(x_TK, row_M, start, mine_R1.shape[0]), 0.0)
        dy_RN = jnp.where(mine_R1, windows.take(dy_TN, row_M, start, mine_R1.shape[0]), 0.0)
        return (), (windows.transposed_times(dy_RN, x_RK),)

    num_rows, num_experts = dy_TN.shape[0], group_sizes_E.shape[0]
    heights = windows.heights(num_rows, num_experts)
    row_M = _row_index(num_rows, heights)
    schedule = windows.schedule(group_sizes_E, num_rows, heights[-1])
    shape = (num_experts, dy_TN.shape[1], x_TK.shape[1])
    total = windows.zeros(shape, jnp.float32, (dy_TN, x_TK, group_sizes_E))
    _, (dw_ENK,) = windows.run(schedule, heights, body, lambda expert: (), (), (total,))
    return dw_ENK


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _grouped_matmul(x_TK, w_ENK, group_sizes_E, bias_EN, row_scale_T, out_dtype):
    num_rows, num_experts = x_TK.shape[0], w_ENK.shape[0]
    heights = windows.heights(num_rows, num_experts)
    inside_T = jnp.arange(num_rows) < jnp.sum(group_sizes_E)
    row_M = _row_index(num_rows, heights)
    few = windows.few(num_rows, num_experts)

    def weights(expert):
        return None if few else windows.transposed(windows.expert_weight(w_ENK, expert))

    def body(expert, start, mine_R1, w_KN, buffers):
        x_RK = windows.take(x_TK, row_M, start, mine_R1.shape[0])
        y_RN = few_rows.times(x_RK, w_ENK, expert) if few else x_RK @ w_KN
        if row_scale_T is not None:
            y_RN = y_RN * _column(row_scale_T, row_M, start, mine_R1)
        if bias_EN is not None:
            y_RN = y_RN + bias_EN[expert].astype(jnp.float32)[None, :]
        return (windows.put(buffers[0], y_RN, start),), ()

    schedule = windows.schedule(group_sizes_E, num_rows, heights[-1])
    shape = (num_rows + heights[-1], w_ENK.shape[1])
    buffer = windows.zeros(shape, out_dtype, (x_TK, w_ENK, group_sizes_E))
    (y_MN,), _ = windows.run(schedule, heights, body, weights, (buffer,))
    return jnp.where(inside_T[:, None], y_MN[:num_rows], jnp.zeros((), out_dtype))


def _forward(x_TK, w_ENK, group_sizes_E, bias_EN, row_scale_T, out_dtype):
    operands = (x_TK, w_ENK, group_sizes_E, bias_EN, row_scale_T)
    return _grouped_matmul(*operands, out_dtype), operands


def _backward(out_dtype, operands, dy_TN):
    x_TK, w_ENK, group_sizes_E, bias_EN, row_scale_T = operands
    frozen = isinstance(w_ENK, formats.BlockScaled)
    num_rows, num_experts = x_TK.shape[0], w_ENK.shape[0]
    heights = windows.heights(num_rows, num_experts)
    row_M = _row_index(num_rows, heights)

    def weights(expert):
        return windows.expert_weight(w_ENK, expert)

    def body(expert, start, mine_R1, w_NK, buffers):
        # Rows of the next expert, or of nobody, are cut by where: 0 * NaN is NaN.
        x_RK = jnp.where(mine_R1, windows.take(x_TK, row_M, start, mine_R1.shape[0]), 0.0)
        dy_RN = jnp.where(mine_R1, windows.take(dy_TN, row_M, start, mine_R1.shape[0]), 0.0)
        dx_RK = dy_RN @ w_NK
        dscale_R = jnp.sum(dx_RK * x_RK, axis=1)
        dbias_N = jnp.sum(dy_RN, axis=0)
        if row_scale_T is not None:
            scale_R1 = jnp.where(mine_R1, _column(row_scale_T, row_M, start, mine_R1), 0.0)
            dx_RK, dy_RN = dx_RK * scale_R1, dy_RN * scale_R1
        written = (windows.put(buffers[0], dx_RK, start),)
        if row_scale_T is not None:
            written += (windows.put(buffers[1], dscale_R, start),)
        additions = () if frozen else (windows.transposed_times(dy_RN, x_RK),)
        return written, additions + ((dbias_N,) if bias_EN is not None else ())

    like = (x_TK, w_ENK, group_sizes_E)
    padded = num_rows + heights[-1]
    buffers = (windows.zeros((padded, x_TK.shape[1]), x_TK.dtype, like),)
    if row_scale_T is not None:
        buffers += (windows.zeros((padded,), row_scale_T.dtype, like),)
    totals = () if frozen else (windows.zeros(w_ENK.shape, jnp.float32, like),)
    if bias_EN is not None:
        totals += (windows.zeros(bias_EN.shape, jnp.float32, like),)
    schedule = windows.schedule(group_sizes_E, num_rows, heights[-1])
    buffers, totals = windows.run(schedule, heights, body, weights, buffers, totals)

    inside_T = jnp.arange(num_rows) < jnp.sum(group_sizes_E)
    dx_TK = jnp.where(inside_T[:, None], buffers[0][:num_rows], jnp.zeros((), x_TK.dtype))
    dw_ENK = None if frozen else totals[0].astype(w_ENK.dtype)
    dbias_EN = None if bias_EN is None else totals[-1].astype(bias_EN.dtype)
    dscale_T = None
    if row_scale_T is not None:
        dscale_T = jnp.where(inside_T, buffers[1][:num_rows], jnp.zeros((), row_scale_T.dtype))
    return dx_TK, dw_ENK, None, dbias_EN, dscale_T


_grouped_matmul.defvjp(_forward, _backward)


def _row_index(num_rows: int, heights: tuple[int, ...]) -> jax.Array:
    """Row numbers, with row 0 where a window runs past the last one."""
    return jnp.pad(jnp.arange(num_rows, dtype=jnp.int32), (0, heights[-1]))


def _column(a_T: jax.Array, row_M: jax.Array, start: jax.Array, mine_R1: jax.Array) -> jax.Array:
    return windows.take(a_T, row_M, start, mine_R1.shape[0])[:, None]
