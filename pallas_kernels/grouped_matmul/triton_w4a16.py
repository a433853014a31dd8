"""Weight-only grouped matmul for any NVIDIA GPU from sm_80 on: activations in 16 bits, packed FP4 weights, in Triton.

Weights are read packed, decoded in registers by integer operations, exactly, and multiplied on the 16-bit tensor cores
with float32 sums: `mma.sync`, on sm_90 `wgmma` and on sm_100 `tcgen05` where tiles have at least 64 rows. Not yet run
on hardware.

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import formats
from pallas_kernels.grouped_matmul import triton_launch
from pallas_kernels.grouped_matmul.triton_launch import Tiling

__all__ = ["Tiling", "default_tiling", "grouped_matmul_codes"]

_MAJORS = (8, 9, 10, 12)


def default_tiling(rows_per_expert: float, N: int, K: int, capability: tuple[int, int]) -> Tiling:
    """Returns a tiling: for decoding, where few rows share a weight, or for prefill.

    Args:
      rows_per_expert: T / E, or the mean over the experts that have rows.
      N: outputs.
      K: inputs.
      capability: of the GPU.
    """
    if rows_per_expert <= 16:
        return Tiling(16, 128 if N >= 1024 else 64, 128, 4, 4)
    # wgmma and tcgen05 read the decoded weights from shared memory, where one warp's serve all of them: wide tiles.
    # With mma.sync they pass through registers, and a thread has no more for wider ones.
    in_shared = capability[0] in (9, 10)
    num_stages = 4 if in_shared else 3
    if rows_per_expert <= 64:
        return Tiling(64, 128, 64, 4, num_stages)
    return Tiling(128, 256 if in_shared and N >= 256 else 128, 64, 8, num_stages)


def grouped_matmul_codes(
    x_TK: jax.Array,
    w: formats.BlockScaled,
    group_sizes_E: jax.Array,
    *,
    expert_scale_E: jax.Array | None = None,
    row_scale_T: jax.Array | None = None,
    bias_EN: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
    tiling: Tiling | None = None,
    capability: tuple[int, int],
) -> jax.Array:
    """Multiplies rows sorted by expert with packed weights, decoded on the way.

        y[t] = cast(sum_k x[t, k] (code * scale)[e(t), :, k] * (expert_scale[e(t)] * row_scale[t]) + bias[e(t)])

    Args:
      x_TK: (T, K) bfloat16, or float16 with NVFP4 weights. Its products with code * scale are exact.
      w: (E, N, K) in "nvfp4" (also 2D and 4/6) or "mxfp4", scales in linear layout. Any N; K a multiple of the block
        (16 or 32). Rows of codes are read 16 bytes at a time where K is a multiple of 32.
      group_sizes_E: (E,) integers >= 0, rows per expert; groups end where x does.
      expert_scale_E: (E,) float32; None is w's global scale, 1 for MXFP4.
      row_scale_T: (T,) float; None is 1.
      bias_EN: (E, N) float, added in float32 before the cast.
      out_dtype: float32, bfloat16 or float16; None is the dtype of x.
      tiling: None is `default_tiling`.
      capability: compute capability that is compiled for, such as (9, 0).

    Returns:
      y_TN: (T, N), exactly zero beyond the groups. Sums are float32; the order of summation is the tensor core's.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: a format, dtype or GPU that the kernel does not take; Triton is not installed.
    """
    out_dtype = x_TK.dtype if out_dtype is None else out_dtype
    triton_launch.check(
        w, x_TK.shape, group_sizes_E, expert_scale_E, row_scale_T, bias_EN, out_dtype
    )
    _check_supported(x_TK, w, capability)
    num_rows, inputs = x_TK.shape
    if tiling is None:
        tiling = default_tiling(num_rows / w.shape[0], w.shape[1], inputs, capability)
    kernel = triton_launch.kernels("triton_w4a16_kernel").w4a16
    call = triton_launch.prepare(
        {"x": x_TK},
        w,
        group_sizes_E,
        num_rows=num_rows,
        expert_scale_E=expert_scale_E,
        row_scale_T=row_scale_T,
        bias_EN=bias_EN,
        out_dtype=out_dtype,
        tiling=tiling,
    )
    return triton_launch.launch(kernel, call, tiling, capability, "w4a16")


def _check_supported(x_TK: jax.Array, w: formats.BlockScaled, capability: tuple[int, int]) -> None:
    if capability[0] not in _MAJORS:
        raise NotImplementedError(
            f"triton_w4a16 is for compute capability 8.0 to 12.x, got {capability[0]}.{capability[1]}"
        )
    if x_TK.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"triton_w4a16 takes bfloat16 or float16 activations, got {x_TK.dtype}"
        )
    if x_TK.dtype == jnp.float16 and formats.FORMATS[w.format].scale == "e8m0":
        raise NotImplementedError(
            "triton_w4a16 takes MXFP4 weights with bfloat16 activations: float16 does not hold their scales"
        )
