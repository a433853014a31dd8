"""The expert feed-forward with gate/up, SwiGLU, down, and the gather of its rows, fused in one window.

Rows are gathered where they are used, so no sorted copy of the tokens exists; the hidden layer is stored only when a
gradient follows (recomputing it would cost a fifth of the step). One loop serves sorted rows and routed tokens.

T tokens, N assignments sorted by expert, M rows of a padded buffer, D model width, F expert width, G = 2F, E experts,
R rows of a window.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats
from pallas_kernels.grouped_matmul import few_rows, windows
from pallas_kernels.grouped_matmul.precision import Weight


def expert_mlp(x_ND, gate_up_EGD, down_EDF, group_sizes_E, out_dtype):
    """As `reference.expert_mlp`, for rows that are already sorted by expert."""
    if x_ND.shape[0] == 0:
        return jnp.zeros(x_ND.shape, out_dtype)
    operands = windows.vary_alike(x_ND, gate_up_EGD, down_EDF, group_sizes_E)
    return _expert_mlp(*operands, jnp.dtype(out_dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _expert_mlp(x_ND, gate_up, down, group_sizes_E, out_dtype):
    row_N = jnp.arange(x_ND.shape[0], dtype=jnp.int32)
    y_MD, _ = forward(x_ND, row_N, gate_up, down, group_sizes_E, out_dtype)
    return _mask_tail(y_MD, group_sizes_E, x_ND.shape[0])


def _forward(x_ND, gate_up, down, group_sizes_E, out_dtype):
    row_N = jnp.arange(x_ND.shape[0], dtype=jnp.int32)
    y_MD, hidden_MG = forward(
        x_ND, row_N, gate_up, down, group_sizes_E, out_dtype, keep_hidden=True
    )
    y_ND = _mask_tail(y_MD, group_sizes_E, x_ND.shape[0])
    return y_ND, (x_ND, gate_up, down, group_sizes_E, hidden_MG)


def _backward(out_dtype, residuals, dy_ND):
    x_ND, gate_up, down, group_sizes_E, hidden_MG = residuals
    row_N = jnp.arange(x_ND.shape[0], dtype=jnp.int32)
    dx_MD, dgate_up, ddown, _ = backward(
        x_ND, row_N, None, gate_up, down, group_sizes_E, hidden_MG, dy_ND
    )
    return _mask_tail(dx_MD, group_sizes_E, x_ND.shape[0]), dgate_up, ddown, None


_expert_mlp.defvjp(_forward, _backward)


def forward(
    x_TD: jax.Array,
    row_N: jax.Array,
    gate_up: Weight,
    down: Weight,
    group_sizes_E: jax.Array,
    out_dtype: jnp.dtype,
    *,
    keep_hidden: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """y[n] = down[e(n)] (silu(gate) * up), [gate, up] = gate_up[e(n)] x[row[n]].

    Args:
      x_TD: tokens.
      row_N: int32 token of each assignment, assignments sorted by expert.
      gate_up: (E, 2F, D).
      down: (E, D, F).
      group_sizes_E: int32, assignments per expert; sum at most N.
      out_dtype: of y.
      keep_hidden: return [gate, up] too, for `backward`.

    Returns:
      y_MD and hidden_MG (or None), M > N; rows from sum(group_sizes) on mean nothing.
    """
    num_rows, heights, row_M = _layout(row_N, gate_up)
    few = windows.few(num_rows, gate_up.shape[0])

    def weights(expert):
        experts = () if few else (windows.expert_weight(w, expert) for w in (gate_up, down))
        return tuple(map(windows.transposed, experts))

    def body(expert, start, mine_R1, weights, buffers):
        x_RD = windows.take(x_TD, row_M, start, mine_R1.shape[0])
        if few:
            values = few_rows.feed_forward(x_RD, gate_up, down, expert, x_TD.dtype)
        else:
            values = _feed_forward(x_RD, *weights, x_TD.dtype)
        values = values[: len(buffers)]
        return tuple(windows.put(b, v, start) for b, v in zip(buffers, values, strict=True)), ()

    like = (x_TD, row_N, gate_up, down, group_sizes_E)
    padded = num_rows + heights[-1]
    buffers = (windows.zeros((padded, down.shape[1]), out_dtype, like),)
    if keep_hidden:
        buffers += (windows.zeros((padded, gate_up.shape[1]), x_TD.dtype, like),)
    schedule = windows.schedule(group_sizes_E, num_rows, heights[-1])
    buffers, _ = windows.run(schedule, heights, body, weights, buffers)
    return buffers[0], buffers[1] if keep_hidden else None


def backward(
    x_TD: jax.Array,
    row_N: jax.Array,
    scale_N: jax.Array | None,
    gate_up: Weight,
    down: Weight,
    group_sizes_E: jax.Array,
    hidden_MG: jax.Array,
    dy_TD: jax.Array,
) -> tuple[jax.Array, Weight | None, Weight | None, jax.Array | None]:
    """Gradients of sum over n of scale[n] * <y[n], dy[row[n]]> for the y of `forward`.

    Args:
      x_TD, row_N, gate_up, down, group_sizes_E: as in `forward`.
      scale_N: float32 factor of each assignment's output, in sorted order; None is 1.
      hidden_MG: from `forward`.
      dy_TD: gradient that reaches each token.

    Returns:
      dx_MD per assignment in the dtype of x (rows from sum(group_sizes) on mean nothing); the gradients of gate_up
      and down, None where packed; dscale_M float32, None where scale_N is.
    """
    num_rows, heights, row_M = _layout(row_N, gate_up)
    frozen = isinstance(gate_up, formats.BlockScaled), isinstance(down, formats.BlockScaled)
    scale_M = None if scale_N is None else jnp.pad(scale_N, (0, heights[-1]))

    def weights(expert):
        return tuple(windows.expert_weight(w, expert) for w in (gate_up, down))

    def body(expert, start, mine_R1, weights, buffers):
        gate_up_GD, down_DF = weights
        height = mine_R1.shape[0]
        # Rows of the next expert, or of nobody, are cut by where: 0 * NaN is NaN.
        dy_RD = jnp.where(mine_R1, windows.take(dy_TD, row_M, start, height), 0.0)
        hidden_RG = lax.dynamic_slice_in_dim(hidden_MG, start, height).astype(jnp.float32)
        dact_RF = dy_RD @ down_DF
        act_RF, dact_to_dhidden = _swiglu(jnp.where(mine_R1, hidden_RG, 0.0))
        # <dy, down act> = <down.T dy, act>: no output needed.
        dscale_R = jnp.sum(dact_RF * act_RF, axis=1)
        if scale_M is not None:
            scale_R1 = lax.dynamic_slice_in_dim(scale_M, start, height)[:, None]
            scale_R1 = jnp.where(mine_R1, scale_R1, 0.0)
            dact_RF, act_RF = dact_RF * scale_R1, act_RF * scale_R1
        dhidden_RG = dact_to_dhidden(dact_RF)
        additions = ()
        if not frozen[0]:
            x_RD = jnp.where(mine_R1, windows.take(x_TD, row_M, start, height), 0.0)
            additions += (windows.transposed_times(dhidden_RG, x_RD),)
        if not frozen[1]:
            additions += (windows.transposed_times(dy_RD, act_RF),)
        values = (dhidden_RG @ gate_up_GD, dscale_R)[: len(buffers)]
        written = tuple(windows.put(b, v, start) for b, v in zip(buffers, values, strict=True))
        return written, additions

    like = (x_TD, row_N, gate_up, down, group_sizes_E, dy_TD)
    padded = num_rows + heights[-1]
    buffers = (windows.zeros((padded, x_TD.shape[1]), x_TD.dtype, like),)
    if scale_N is not None:
        buffers += (windows.zeros((padded,), jnp.float32, like),)
    trained = [w for w, packed in zip((gate_up, down), frozen, strict=True) if not packed]
    totals = tuple(windows.zeros(w.shape, jnp.float32, like) for w in trained)
    schedule = windows.schedule(group_sizes_E, num_rows, heights[-1])
    buffers, totals = windows.run(schedule, heights, body, weights, buffers, totals)
    gradients = iter(total.astype(w.dtype) for total, w in zip(totals, trained, strict=True))
    dgate_up, ddown = (None if packed else next(gradients) for packed in frozen)
    return buffers[0], dgate_up, ddown, buffers[1] if scale_N is not None else None


def _feed_forward(x_RD, gate_up_DG, down_FD, dtype) -> tuple[jax.Array, jax.Array]:
    """As `few_rows.feed_forward`, of transposed weights."""
    hidden_RG = x_RD @ gate_up_DG
    gate_RF, up_RF = jnp.split(hidden_RG, 2, axis=-1)
    act_RF = (jax.nn.silu(gate_RF) * up_RF).astype(dtype)
    return act_RF.astype(jnp.float32) @ down_FD, hidden_RG


def _layout(row_N: jax.Array, gate_up: Weight) -> tuple[int, tuple[int, ...], jax.Array]:
    """Number of rows, window heights, and row_N padded by the largest (with row 0, whose results are masked)."""
    num_rows = row_N.shape[0]
    heights = windows.heights(num_rows, gate_up.shape[0])
    return num_rows, heights, jnp.pad(row_N, (0, heights[-1]))


def _swiglu(hidden_RG: jax.Array):
    """Returns silu(gate) * up and the function from its gradient to that of [gate, up]."""
    gate_RF, up_RF = jnp.split(hidden_RG, 2, axis=-1)
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF

    def transpose(dact_RF):
        dgate_RF = dact_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF))
        return jnp.concatenate([dgate_RF, dact_RF * silu_RF], axis=-1)

    return silu_RF * up_RF, transpose


def _mask_tail(a_MD: jax.Array, group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    inside_N = jnp.arange(num_rows) < jnp.sum(group_sizes_E)
    return jnp.where(inside_N[:, None], a_MD[:num_rows], jnp.zeros((), a_MD.dtype))
