"""Plain bfloat16 grouped matmul through `tokamax.ragged_dot` (Pallas Mosaic GPU, sm_90 and sm_100): to compare with.

Not in the choice of kernels. tokamax takes its tile sizes from its cache of autotuned ones, and small defaults where
the shape is not in it: time it after `tokamax.autotune`. It has no FP8 by FP8 product: its FP8 kernel (sm_100) wants
weights in 4-bit integers. Not yet run on hardware.

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import operands

DTYPES = (jnp.bfloat16, jnp.float16)


def grouped_matmul(
    x_TK: jax.Array,
    w_ENK: jax.Array,
    group_sizes_E: jax.Array,
    bias_EN: jax.Array | None,
    row_scale_T: jax.Array | None,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """y[t] = row_scale[t] * (w[e(t)] @ x[t]) + bias[e(t)], zero beyond the groups. Forward only.

    Its kernel for sm_90 reads weights as (E, K, N): from (E, N, K) XLA copies all of them in every call. To time the
    product alone, hold them as (E, K, N) and pass `jnp.swapaxes(w_EKN, 1, 2)` under the same jit: the two cancel. Its
    kernel for sm_100 reads (E, N, K).

    Args:
      x_TK: bfloat16 or float16.
      w_ENK: of the dtype of x.
      group_sizes_E: int32.
      bias_EN: float, or None.
      row_scale_T: float, or None.
      out_dtype: of the result.

    Raises:
      NotImplementedError: tokamax is not installed, or has no kernel for these operands on this device.
    """
    tokamax = _tokamax()
    if x_TK.dtype not in DTYPES or getattr(w_ENK, "dtype", None) != x_TK.dtype:
        came = f"{x_TK.dtype} and {getattr(w_ENK, 'dtype', type(w_ENK).__name__)}"
        raise NotImplementedError(
            f"tokamax takes rows and weights that are both bfloat16 or both float16, got {came}"
        )
    plain = bias_EN is None and row_scale_T is None
    y_TN = tokamax.ragged_dot(
        x_TK,
        jnp.swapaxes(w_ENK, 1, 2),
        group_sizes_E,
        preferred_element_type=jnp.dtype(out_dtype if plain else jnp.float32),
        implementation="mosaic_gpu",
    )
    if row_scale_T is not None:
        y_TN = y_TN * row_scale_T.astype(jnp.float32)[:, None]
    if bias_EN is not None:
        y_TN = y_TN + operands.of_group(bias_EN, group_sizes_E, y_TN.shape[0])
    # Rows of no group are left undefined.
    inside_T = jnp.arange(x_TK.shape[0]) < jnp.sum(group_sizes_E)
    return jnp.where(inside_T[:, None], y_TN, jnp.zeros((), y_TN.dtype)).astype(out_dtype)


def _tokamax():
    """Imports tokamax, which takes seconds: only where it is called."""
    try:
        return importlib.import_module("tokamax")
    except ImportError as error:
        raise NotImplementedError(
            f"tokamax cannot be imported ({error}): pip install 'moelab[cuda]'"
        ) from error
