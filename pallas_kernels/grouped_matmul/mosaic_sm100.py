"""Grouped matmul with 4-bit rows and 4-bit weights on data-centre Blackwell (tcgen05), in Pallas Mosaic GPU.

NVFP4 and MXFP4, for sm_100, sm_103 and sm_107. Exact products, sums in float32 in the tensor core's order. Compiled for
these GPUs and run in interpret mode; not yet run on hardware.

T rows sorted by expert, K contraction axis, N output axis, E experts, C = scales of a row / 4.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import FORMATS, BlockScaled, arranged
from pallas_kernels.grouped_matmul import mosaic_sm100_loop as main_loop
from pallas_kernels.grouped_matmul import row_copies, tiles
from pallas_kernels.grouped_matmul.mosaic_sm100_tiling import TILE_M, Tiling

__all__ = ["Tiling", "grouped_matmul_codes"]

OUT_DTYPES = (jnp.bfloat16, jnp.float32)


def grouped_matmul_codes(
    x: BlockScaled,
    w: BlockScaled,
    group_sizes_E: jax.Array,
    *,
    expert_scale_E: jax.Array,
    row_scale_T: jax.Array | None = None,
    bias_EN: jax.Array | None = None,
    out_dtype: jnp.dtype,
    tiling: Tiling,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """Multiplies packed rows with their expert's packed weight; zero beyond the groups.

        y[t] = cast(sum_k (code * scale)(x[t, k]) * (code * scale)(w[e, :, k]) * (expert_scale[e] * row_scale[t])
                    + bias[e])                                                          e = e(t), all in float32

    Global scales of NVFP4 are left to expert_scale_E and row_scale_T: `global_amax` is not read here.

    Args:
      x: (T, K), 4-bit, rows sorted by expert. K a multiple of tile_k (256). Where T is below tile_m or no multiple of
        8, its rows are padded here, which copies its codes.
      w: (E, N, K), in a format of x's block and scales; N a multiple of tile_n. Scales of both may be "linear" or
        "tcgen05"; arrange those of weights once, when they are loaded.
      group_sizes_E: int32, at most T together: groups end where the rows do.
      expert_scale_E: float32.
      row_scale_T: float32, or None for 1.
      bias_EN: float, or None.
      out_dtype: bfloat16 or float32.
      tiling: sizes, within the budgets of shared and tensor memory.
      num_sms: streaming multiprocessors to use.
      interpret: parameters of interpret mode, or None for a GPU.

    Returns:
      out_dtype (T, N).

    Raises:
      ValueError: shapes, formats or dtypes that do not go together, or a tiling that does not fit.
      NotImplementedError: a collective tiling in interpret mode.
    """
    out_dtype = jnp.dtype(out_dtype)
    check(x, w, group_sizes_E, expert_scale_E, row_scale_T, bias_EN, out_dtype, tiling, num_sms)
    if interpret is not None and tiling.collective:
        raise NotImplementedError("interpret mode has no products of two CTAs (collective=True)")
    num_rows, num_columns = x.shape[0], w.shape[1]
    if not num_rows or not num_columns:
        return jnp.zeros((num_rows, num_columns), out_dtype)
    schedule = tiles.schedule(group_sizes_E, num_rows, tiling.tile_m)
    used = jnp.minimum(jnp.sum(group_sizes_E, dtype=jnp.int32), num_rows)
    inputs = [used.reshape(1), expert_scale_E]
    if row_scale_T is not None:
        inputs.append(jnp.pad(row_scale_T, (0, -num_rows % tiling.tile_m)))
    if bias_EN is not None:
        inputs.append(bias_EN)
    epilogue = main_loop.Epilogue(
        inputs=tuple(inputs),
        out_type=(jax.ShapeDtypeStruct((num_rows, num_columns), out_dtype),),
        scratch={"out": tiling.out_buffers(out_dtype)},
        num_columns=num_columns // tiling.tile_n,
        boxes=lambda column: (column * tiling.tile_n,),
        store=functools.partial(
            _store, tiling=tiling, scaled=row_scale_T is not None, biased=bias_EN is not None
        ),
        finish=functools.partial(_zero_the_rest, tiling=tiling),
    )
    return main_loop.run(
        operands(x, w, tiling.tile_m),
        schedule,
        epilogue,
        tiling,
        format=w.format,
        num_sms=num_sms,
        name=f"grouped_matmul_{w.format}",
        interpret=interpret,
    )[0]


def check(
    x: BlockScaled,
    w: BlockScaled,
    group_sizes_E: jax.Array,
    expert_scale_E: jax.Array,
    row_scale_T: jax.Array | None,
    bias_EN: jax.Array | None,
    out_dtype: jnp.dtype,
    tiling: Any,
    num_sms: int,
    *,
    columns: int | None = None,
) -> None:
    """Raises ValueError for what `grouped_matmul_codes` does not take; columns of a tile are tiling.tile_n, if None."""
    specs = [FORMATS[q.format] for q in (x, w)]
    if any(s.element.bits != 4 or s.float_scales for s in specs):
        raise ValueError(
            f"needs NVFP4 or MXFP4 rows and weights, got {x.format} rows and {w.format} weights"
        )
    if (specs[0].scale, specs[0].block) != (specs[1].scale, specs[1].block):
        raise ValueError(
            f"rows and weights need scales of one kind, got {x.format} rows and {w.format} weights"
        )
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"needs x (T, K) and w (E, N, K), got {x.shape} and {w.shape}")
    (num_rows, depth), (num_experts, num_columns, _) = x.shape, w.shape
    if not depth or depth % tiling.tile_k:
        raise ValueError(
            f"K must be a multiple of tile_k = {tiling.tile_k}, got {depth}: pad weights when they are loaded and rows "
            "when they are quantized (2880 of gpt-oss to 3072)"
        )
    columns = tiling.tile_n if columns is None else columns
    if num_columns % columns:
        raise ValueError(
            f"N must be a multiple of {columns}, the columns of a tile, got {num_columns}: pad weights when they are "
            "loaded (2880 of gpt-oss to 3072)"
        )
    expected = {
        "group_sizes_E": (group_sizes_E, (num_experts,), jnp.int32),
        "expert_scale_E": (expert_scale_E, (num_experts,), jnp.float32),
        "row_scale_T": (row_scale_T, (num_rows,), jnp.float32),
        "bias_EN": (bias_EN, (num_experts, num_columns), None),
    }
    for name, (array, shape, dtype) in expected.items():
        if array is None:
            continue
        if array.shape != shape or (dtype is not None and array.dtype != dtype):
            kind = "float" if dtype is None else jnp.dtype(dtype).name
            raise ValueError(f"{name} must be {kind} {shape}, got {array.dtype.name} {array.shape}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be bfloat16 or float32, got {out_dtype}")
    if num_sms < tiling.num_ctas:
        raise ValueError(f"num_sms must be at least {tiling.num_ctas}, got {num_sms}")
    tiling.check_budgets(w.format, out_dtype)


def operands(x: BlockScaled, w: BlockScaled, tile_m: int) -> main_loop.Operands:
    """Returns both operands as tensor cores take them: bitcasts, and rows padded to tile_m or a multiple of 8.

    Copies that reach beyond the last rows bring zeros.
    """
    num_rows = x.shape[0]
    pad = max(tile_m - num_rows, -num_rows % 8)
    codes_x = jnp.pad(x.codes, ((0, pad), (0, 0))) if pad else x.codes
    x_scales = arranged(x, "tcgen05").scales
    missing = -(-num_rows // tile_m) * tile_m // TILE_M - x_scales.shape[0]
    if missing:
        x_scales = jnp.pad(x_scales, ((0, missing), (0, 0), (0, 0), (0, 0)))
    scale = main_loop.scale_dtype(w.format)
    return main_loop.Operands(
        four_bit(codes_x),
        lax.bitcast_convert_type(x_scales, scale),
        four_bit(w.codes),
        lax.bitcast_convert_type(arranged(w, "tcgen05").scales, scale),
    )


def four_bit(codes: jax.Array) -> jax.Array:
    """Returns uint8 [..., K / 2] as float4_e2m1fn [..., K]: no byte moves."""
    pair = lax.bitcast_convert_type(codes, jnp.float4_e2m1fn)
    return pair.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def _store(
    tile: main_loop.Tile, acc, release, inputs, outputs, scratch, *, tiling, scaled, biased
) -> None:
    """Scales an accumulator by columns of epilogue_n, and stores the expert's rows of it."""
    _, expert_scale_E, *optional = inputs
    width, chunks = tiling.epilogue_n, tiling.tile_n // tiling.epilogue_n
    layout = plgpu.Layout.TCGEN05
    factor = expert_scale_E[tile.expert]
    if scaled:
        rows = optional[0].at[pl.ds(tile.block * TILE_M, TILE_M)]
        row_T = plgpu.load(rows, layout=layout.reduce(1), optimized=False)
        factor = lax.broadcast_in_dim(row_T * factor, (TILE_M, width), (0,))

    def columns(chunk):
        return pl.ds(tile.column * tiling.tile_n + chunk * width, width)

    def scaled_columns(chunk):
        out = plgpu.async_load_tmem(acc.at[:, pl.ds(chunk * width, width)], layout=layout) * factor
        if biased:
            bias = optional[-1].at[tile.expert, columns(chunk)]
            bias_N = plgpu.load(bias, layout=layout.reduce(0), optimized=False)
            bias_N = bias_N.astype(jnp.float32)
            out = out + lax.broadcast_in_dim(bias_N, (TILE_M, width), (1,))
        if chunk == chunks - 1:
            release()
        return out.astype(outputs[0].dtype)

    for chunk in range(chunks):
        value = scaled_columns(chunk)
        buffer = scratch["out"].at[chunk % 2]
        # The copies that read this buffer two chunks ago.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        buffer[...] = value
        plgpu.commit_smem()
        to = tile.block * TILE_M + tile.first_row
        row_copies.store_rows(buffer, outputs[0], tile.first_row, to, tile.rows, columns(chunk))


def _zero_the_rest(share, shares, inputs, outputs, scratch, *, tiling) -> None:
    """Writes zeros into the rows beyond the groups, blocks of 128 rows in turn."""
    used, (out,), width = inputs[0][0], outputs, tiling.epilogue_n
    num_rows, num_columns = out.shape
    buffer = scratch["out"].at[0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)
    plgpu.commit_smem()
    first_block = lax.div(used, jnp.int32(TILE_M))

    def zero_block(i, _):
        block = first_block + share + i * shares
        first = jnp.maximum(used - block * TILE_M, 0)
        rows = jnp.minimum(num_rows - block * TILE_M, TILE_M) - first

        def zero_columns(j, _):
            to = block * TILE_M + first
            row_copies.store_rows(buffer, out, first, to, rows, pl.ds(j * width, width))

        lax.fori_loop(0, num_columns // width, zero_columns, None)

    blocks = jnp.where(used < num_rows, pl.cdiv(num_rows, TILE_M) - first_block, 0)
    lax.fori_loop(0, pl.cdiv(jnp.maximum(blocks - share, 0), shares), zero_block, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
