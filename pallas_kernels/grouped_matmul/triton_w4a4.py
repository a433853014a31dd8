"""Grouped matmul of packed FP4 activations and weights for RTX Blackwell (sm_120), in Triton.

`tl.dot_scaled` becomes `mma.sync.m16n8k64` with kind::mxf4nvf4.block_scale: scale_vec::4X with E4M3 scales for NVFP4,
2X with E8M0 scales for MXFP4. Sums are float32. Not yet run on hardware.

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import formats
from pallas_kernels.grouped_matmul import triton_launch
from pallas_kernels.grouped_matmul.triton_launch import Tiling

__all__ = ["Tiling", "default_tiling", "grouped_matmul_codes"]


def default_tiling(rows_per_expert: float, N: int, K: int, capability: tuple[int, int]) -> Tiling:
    """Returns a tiling: for decoding, where few rows share a weight, or for prefill.

    Args:
      rows_per_expert: T / E, or the mean over the experts that have rows.
      N: outputs.
      K: inputs.
      capability: of the GPU.
    """
    if rows_per_expert <= 16:
        return Tiling(16, 128 if N >= 1024 else 64, 256, 4, 3)
    if rows_per_expert <= 64:
        return Tiling(64, 128, 256, 4, 3)
    return Tiling(128, 128, 256, 8, 3)


def grouped_matmul_codes(
    x: formats.BlockScaled,
    w: formats.BlockScaled,
    group_sizes_E: jax.Array,
    *,
    expert_scale_E: jax.Array | None = None,
    row_scale_T: jax.Array | None = None,
    bias_EN: jax.Array | None = None,
    out_dtype: jnp.dtype,
    tiling: Tiling | None = None,
    capability: tuple[int, int],
) -> jax.Array:
    """Multiplies packed rows sorted by expert with packed weights.

        y[t] = cast(acc[t] * (expert_scale[e(t)] * row_scale[t]) + bias[e(t)]),
        acc[t] = sum_k (code * scale)[t, k] (code * scale)[e(t), :, k]

    Args:
      x: (T, K) in a format with the same kind of scale as w, scales in linear layout.
      w: (E, N, K) in "nvfp4" (also 2D and 4/6) or "mxfp4", scales in linear layout. Any N; K a multiple of the block
        (16 or 32). Rows of codes are read 16 bytes at a time where K is a multiple of 32.
      group_sizes_E: (E,) integers >= 0, rows per expert; groups end where x does.
      expert_scale_E: (E,) float32; None is w's global scale, 1 for MXFP4.
      row_scale_T: (T,) float, in place of x's global scale; None is that (1 for MXFP4).
      bias_EN: (E, N) float, added in float32 before the cast.
      out_dtype: float32, bfloat16 or float16.
      tiling: None is `default_tiling`.
      capability: compute capability that is compiled for, such as (12, 0).

    Returns:
      y_TN: (T, N), exactly zero beyond the groups.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: a format or GPU that the kernel does not take; Triton is not installed.
    """
    triton_launch.check(w, x.shape, group_sizes_E, expert_scale_E, row_scale_T, bias_EN, out_dtype)
    _check_supported(x, w, capability)
    num_rows, inputs = x.shape
    if row_scale_T is None and x.global_amax is not None:
        row_scale_T = jnp.broadcast_to(formats.global_scale(x), (num_rows,))
    if tiling is None:
        tiling = default_tiling(num_rows / w.shape[0], w.shape[1], inputs, capability)
    kernel = triton_launch.kernels("triton_w4a4_kernel").w4a4
    call = triton_launch.prepare(
        {"x_codes": x.codes, "x_scales": x.scales},
        w,
        group_sizes_E,
        num_rows=num_rows,
        expert_scale_E=expert_scale_E,
        row_scale_T=row_scale_T,
        bias_EN=bias_EN,
        out_dtype=out_dtype,
        tiling=tiling,
    )
    return triton_launch.launch(kernel, call, tiling, capability, "w4a4")


def _check_supported(
    x: formats.BlockScaled, w: formats.BlockScaled, capability: tuple[int, int]
) -> None:
    if capability[0] != 12:
        raise NotImplementedError(
            f"triton_w4a4 is for compute capability 12.x, got {capability[0]}.{capability[1]}"
        )
    x_spec, w_spec = formats.FORMATS[x.format], formats.FORMATS[w.format]
    if x_spec.element is not formats.E2M1 or x_spec.scale != w_spec.scale:
        raise NotImplementedError(
            f"triton_w4a4 takes x and w in 4 bits with one kind of scale, got {x.format} and {w.format}"
        )
    if x.layout != "linear":
        raise ValueError(f"x must have linear scales, got {x.layout} ones")
    if x.scales.shape != (x.shape[0], x.shape[1] // x_spec.block):
        raise ValueError(
            f"x of shape {x.shape} must have scales (T, K / {x_spec.block}), got {x.scales.shape}"
        )
