"""Weight-only grouped matmul for Hopper (wgmma): bfloat16 rows, packed FP4 weights, in Pallas Mosaic GPU.

Weights are read packed and decoded in registers, exactly; products are bfloat16 by bfloat16 with float32 sums in the
tensor core's order. Compiled for H100 and H200 and run in interpret mode; not yet run on hardware.

T rows sorted by expert, K contraction axis, N output axis, E experts, B blocks along K.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import FORMATS, BlockScaled, arranged, global_scale
from pallas_kernels.grouped_matmul import mosaic_sm90_decode as decode
from pallas_kernels.grouped_matmul import mosaic_sm90_loop as loop
from pallas_kernels.grouped_matmul import mosaic_sm90_rows as rows
from pallas_kernels.grouped_matmul.mosaic_sm90_tiling import Tiling, default_tiling

__all__ = ["Tiling", "default_tiling", "grouped_matmul_codes"]

OUT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def grouped_matmul_codes(
    x_TK: jax.Array,
    w: BlockScaled,
    group_sizes_E: jax.Array,
    *,
    expert_scale_E: jax.Array | None = None,
    row_scale_T: jax.Array | None = None,
    bias_EN: jax.Array | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
    tiling: Tiling | None = None,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """Multiplies rows sorted by expert with packed weights, decoded on the way; zero beyond the groups.

        y[t] = cast(sum_k x[t, k] (code * scale)(w[e, :, k]) * (expert_scale[e] * row_scale[t]) + bias[e]),   e = e(t)

    Before the kernel, groups of x are aligned to 8 rows (`mosaic_sm90_rows`) and its columns reordered within each step
    (`decode.interleaved`): one pass over x, which XLA may fuse with whatever made it.

    Args:
      x_TK: bfloat16 (T, K). Its products with code * scale are exact.
      w: (E, N, K) in "nvfp4" (also 2D and 4/6) or "mxfp4". N a multiple of tile_m, K of tile_k. Scales that are not in
        the layout "block_major" are transposed here, in every call: arrange them once, when weights are loaded.
      group_sizes_E: int32 (E,), rows per expert; groups end where x does.
      expert_scale_E: float32 (E,); None is w's global scale, 1 for MXFP4.
      row_scale_T: float32 (T,), or None for 1.
      bias_EN: float (E, N), added in float32 before the cast, or None.
      out_dtype: bfloat16, float16 or float32.
      tiling: sizes, within the budget of shared memory; None is `default_tiling` for T / E rows an expert.
      num_sms: streaming multiprocessors to use.
      interpret: parameters of interpret mode, or None for a GPU. Interpret mode takes another way to the same bits of
        a code (`decode.fields_of_words`); tests compare the two.

    Returns:
      out_dtype (T, N).

    Raises:
      ValueError: shapes, formats or dtypes that do not go together, or a tiling that does not fit.
    """
    out_dtype = jnp.dtype(out_dtype)
    _check_operands(x_TK, w)
    num_experts, num_columns, depth = w.shape
    num_rows = x_TK.shape[0]
    if tiling is None:
        mean = num_rows / num_experts
        tiling = default_tiling(mean, num_columns, depth, w.format, out_dtype)
    if expert_scale_E is None:
        expert_scale_E = global_scale(w)
    if expert_scale_E is None:
        expert_scale_E = jnp.ones(num_experts, jnp.float32)
    scale_EBN = arranged(w, "block_major").scales
    blocks = depth // FORMATS[w.format].block
    expected = {
        "group_sizes_E": (group_sizes_E, (num_experts,), jnp.int32),
        "expert_scale_E": (expert_scale_E, (num_experts,), jnp.float32),
        "row_scale_T": (row_scale_T, (num_rows,), jnp.float32),
        "bias_EN": (bias_EN, (num_experts, num_columns), None),
        "scale_EBN": (scale_EBN, (num_experts, blocks, num_columns), jnp.uint8),
    }
    _check_arrays(expected)
    _check_sizes(num_columns, depth, w.format, out_dtype, tiling, num_sms)
    if not num_rows:
        return jnp.zeros((num_rows, num_columns), out_dtype)
    tiles = rows.row_tiles(group_sizes_E, num_rows, tiling.tile_n)
    used = jnp.minimum(jnp.sum(group_sizes_E, dtype=jnp.int32), num_rows)
    x_PK = rows.aligned(x_TK, group_sizes_E, tiling.tile_n)
    operands = loop.Operands(
        tile_I4=loop.table(tiles),
        counts_2=jnp.stack([tiles.count, used]),
        factor_E=expert_scale_E * jnp.float32(1 / decode.FRACTION),
        word_ENC=decode.words(w.codes),
        scale_EBN=_with_dtype(scale_EBN, w.format),
        x_PK=decode.interleaved(x_PK, tiling.tile_k),
        row_scale_T=None if row_scale_T is None else jnp.pad(row_scale_T, (0, tiling.tile_n)),
        bias_EN=None if bias_EN is None else bias_EN.astype(jnp.float32),
    )
    return loop.run(
        operands,
        jax.ShapeDtypeStruct((num_rows, num_columns), out_dtype),
        tiling,
        format=w.format,
        num_sms=num_sms,
        interpret=interpret,
    )


def _check_operands(x_TK: jax.Array, w: BlockScaled) -> None:
    spec = FORMATS[w.format]
    if spec.element.bits != 4 or spec.float_scales:
        raise ValueError(f"needs NVFP4 or MXFP4 weights, got {w.format}")
    if x_TK.ndim != 2 or w.ndim != 3 or x_TK.shape[1] != w.shape[2] or not w.shape[0]:
        raise ValueError(f"needs x (T, K) and w (E, N, K), got {x_TK.shape} and {w.shape}")
    if x_TK.dtype != jnp.bfloat16:
        raise ValueError(f"needs bfloat16 rows, got {x_TK.dtype}")


def _check_arrays(expected: dict[str, tuple]) -> None:
    for name, (array, shape, dtype) in expected.items():
        if array is None:
            continue
        if array.shape != shape or (dtype is not None and array.dtype != dtype):
            kind = "float" if dtype is None else jnp.dtype(dtype).name
            raise ValueError(f"{name} must be {kind} {shape}, got {array.dtype.name} {array.shape}")


def _check_sizes(
    num_columns: int, depth: int, format: str, out_dtype: jnp.dtype, tiling: Tiling, num_sms: int
) -> None:
    if not depth or depth % tiling.tile_k:
        raise ValueError(f"K must be a multiple of tile_k = {tiling.tile_k}, got {depth}")
    if not num_columns or num_columns % tiling.tile_m:
        raise ValueError(f"N must be a multiple of tile_m = {tiling.tile_m}, got {num_columns}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
    if num_sms < 1:
        raise ValueError(f"num_sms must be at least 1, got {num_sms}")
    tiling.check_budget(format, out_dtype)


def _with_dtype(scale: jax.Array, format: str) -> jax.Array:
    """E4M3 bytes as what they are, which Hopper converts; E8M0 stays bytes, which it cannot."""
    if FORMATS[format].scale == "e4m3":
        return lax.bitcast_convert_type(scale, jnp.float8_e4m3fn)
    return scale
