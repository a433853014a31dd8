"""Grouped matmul for few rows on data-centre Blackwell: operands swapped, y^T = w x^T. Pallas Mosaic GPU.

A block-scaled MMA has 128 rows on its left side, and 8 columns or more on its right. Here weights are on the left and a
few tokens on the right: what is loaded for a step is nearly all weights, so that twice as many steps are in flight in
the same shared memory. That is what decoding waits for where an SM has few steps (`moelab kernels roofline`).

Roles and ring are those of `mosaic_sm100_loop`: weights take the place of its rows, tokens that of its weights. Tiles
of rows are blocks of tile_t; a block that g experts share is visited g times. Scales of the right side take 128 rows of
tensor memory too, so XLA makes a tile of scales for each block, the rest of it zero. The epilogue's threads hold a
column of y each, and store it transposed.

Compiled for these GPUs and run in interpret mode; not yet run on hardware.

T rows sorted by expert, K contraction axis, N output axis, E experts, C = scales of a row / 4.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import FORMATS, BlockScaled, arranged
from pallas_kernels.grouped_matmul import mosaic_sm100 as plain
from pallas_kernels.grouped_matmul import mosaic_sm100_loop as main_loop
from pallas_kernels.grouped_matmul import row_copies, tiles
from pallas_kernels.grouped_matmul.mosaic_sm100_tiling import SMEM_BYTES, TILE_M

__all__ = ["Tiling", "default_tiling", "grouped_matmul_codes"]

_LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
_TILES_T = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tile sizes and the depth of the ring. Hashable, so that it can be static.

    Attributes:
      tile_t: tokens of a tile: 8, 16, 32 or 64. Its 128 columns of y are rows of the weights.
      tile_k: contraction steps of 256, or multiples.
      stages: k-steps of operands in flight.
      accumulators: 2: the next tile is multiplied while the last one is stored; 1: it waits.

    Raises:
      ValueError: sizes that the instructions do not have. The budget depends on the format: `check_budgets`.
    """

    tile_t: int = 8
    tile_k: int = 256
    stages: int = 9
    accumulators: int = 2

    def __post_init__(self):
        if self.tile_t not in _TILES_T:
            raise ValueError(f"tile_t must be 8, 16, 32 or 64, got {self.tile_t}")
        if self.tile_k < 1 or self.tile_k % 256:
            raise ValueError(f"tile_k must be a multiple of 256, got {self.tile_k}")
        if self.accumulators not in (1, 2):
            raise ValueError(f"accumulators must be 1 or 2, got {self.accumulators}")
        if self.stages < 1:
            raise ValueError(f"stages must be at least 1, got {self.stages}")

    # What the main loop calls the two sides, and what it may vary that is fixed here.
    collective = False
    num_ctas = 1
    group_order = 1

    @property
    def tile_n(self) -> int:
        """Columns of an accumulator, which are tokens."""
        return self.tile_t

    loaded_n = tile_n

    def scale_columns(self, format: str) -> int:
        """Scales of a row in one k-step."""
        return self.tile_k // FORMATS[format].block

    def stage_bytes(self, format: str) -> int:
        """Bytes of one k-step in shared memory: codes, and a tile of scales of each operand."""
        codes = (TILE_M + self.tile_t) * self.tile_k // 2
        return codes + 2 * TILE_M * self.scale_columns(format)

    def smem_bytes(self, format: str, out_dtype: jnp.dtype) -> int:
        """Bytes of shared memory, barriers included."""
        buffer = self.tile_t * TILE_M * jnp.dtype(out_dtype).itemsize
        return self.stages * self.stage_bytes(format) + buffer + 1024

    def tmem_columns(self, format: str) -> int:
        """Columns of tensor memory: accumulators, then four per 128 rows and 4 scales."""
        return self.accumulators * self.tile_t + 2 * self.scale_columns(format)

    def check_budgets(self, format: str, out_dtype: jnp.dtype) -> None:
        """Raises ValueError where shared memory does not suffice. Tensor memory always does."""
        smem = self.smem_bytes(format, out_dtype)
        if smem > SMEM_BYTES:
            raise ValueError(
                f"{self} needs {smem} bytes of shared memory for {format} and {jnp.dtype(out_dtype)}, of {SMEM_BYTES}: "
                "fewer stages"
            )


def default_tiling(tile_t: int, format: str, out_dtype: jnp.dtype) -> Tiling:
    """Returns the tiling of so many tokens with the deepest ring that fits."""
    free = SMEM_BYTES - Tiling(tile_t=tile_t, stages=1).smem_bytes(format, out_dtype)
    stages = 1 + free // Tiling(tile_t=tile_t).stage_bytes(format)
    return Tiling(tile_t=tile_t, stages=stages)


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

    Args:
      x, w, group_sizes_E, expert_scale_E, row_scale_T, bias_EN, out_dtype, num_sms, interpret: as in
        `mosaic_sm100.grouped_matmul_codes`. Scales of x are arranged anew, whatever their layout.
      tiling: sizes, within the budget of shared memory.

    Returns:
      out_dtype (T, N).

    Raises:
      ValueError: shapes, formats or dtypes that do not go together, or a tiling that does not fit.
    """
    out_dtype = jnp.dtype(out_dtype)
    scales = (expert_scale_E, row_scale_T, bias_EN)
    plain.check(x, w, group_sizes_E, *scales, out_dtype, tiling, num_sms, columns=TILE_M)
    num_rows, num_columns = x.shape[0], w.shape[1]
    if not num_rows or not num_columns:
        return jnp.zeros((num_rows, num_columns), out_dtype)
    used = jnp.minimum(jnp.sum(group_sizes_E, dtype=jnp.int32), num_rows)
    inputs = [used.reshape(1), expert_scale_E]
    if row_scale_T is not None:
        inputs.append(jnp.pad(row_scale_T, (0, -num_rows % tiling.tile_t)))
    if bias_EN is not None:
        inputs.append(bias_EN)
    epilogue = main_loop.Epilogue(
        inputs=tuple(inputs),
        out_type=(jax.ShapeDtypeStruct((num_rows, num_columns), out_dtype),),
        scratch={"out": plgpu.SMEM((tiling.tile_t, TILE_M), out_dtype)},
        num_columns=num_columns // TILE_M,
        boxes=lambda column: (column * TILE_M,),
        store=functools.partial(_store, scaled=row_scale_T is not None, biased=bias_EN is not None),
        finish=_zero_the_rest,
    )
    return main_loop.run(
        _operands(x, w, tiling.tile_t),
        tiles.schedule(group_sizes_E, num_rows, tiling.tile_t),
        epilogue,
        tiling,
        format=w.format,
        num_sms=num_sms,
        name=f"grouped_matmul_swapped_{w.format}",
        interpret=interpret,
        loop=_Loop,
        compiler_params=_LANE,
    )[0]


def _operands(x: BlockScaled, w: BlockScaled, tile_t: int) -> main_loop.Operands:
    """Both operands as tensor cores take them, rows padded to blocks, and a tile of scales for each block."""
    pad = -x.shape[0] % tile_t
    codes = jnp.pad(x.codes, ((0, pad), (0, 0)))
    scales = jnp.pad(arranged(x, "linear").scales, ((0, pad), (0, 0)))
    blocks = scales.reshape(-1, tile_t, scales.shape[-1])
    one_each = dataclasses.replace(
        x, codes=codes.reshape(blocks.shape[0], tile_t, -1), scales=blocks, global_amax=None,
        layout="linear",
    )  # fmt: skip
    swizzled = arranged(one_each, "tcgen05").scales[:, 0]
    scale = main_loop.scale_dtype(w.format)
    return main_loop.Operands(
        plain.four_bit(codes),
        lax.bitcast_convert_type(swizzled, scale),
        plain.four_bit(w.codes),
        lax.bitcast_convert_type(arranged(w, "tcgen05").scales, scale),
    )


class _Loop(main_loop.Loop):
    """The roles, with weights on the side of 128 rows, whose buffers the main loop calls `x`."""

    def load(self, data: main_loop.Operands) -> None:
        """Fills the ring with steps of 128 rows of weights and a block of tokens."""
        num_steps = data.x_TK.shape[1] // self.tiling.tile_k
        tile_t = self.tiling.tile_t

        @self._over_tiles
        def _(local_index, tile):
            rows = pl.ds(tile.column * TILE_M, TILE_M)
            tokens = pl.ds(tile.block * tile_t, tile_t)

            def step(k, _):
                stage = self._wait_to_load(local_index * num_steps + k)
                codes, scales = self._columns(k), self._scale_columns(k)
                for source, buffer in (
                    (data.w_ENK.at[tile.expert, rows, codes], self.x),
                    (data.w_scales.at[tile.expert, pl.ds(tile.column, 1), scales], self.x_scales),
                    (data.x_TK.at[tokens, codes], self.w),
                    (data.x_scales.at[pl.ds(tile.block, 1), scales], self.w_scales),
                ):
                    plgpu.copy_gmem_to_smem(source, buffer.at[stage], self.full.at[stage])

            lax.fori_loop(0, num_steps, step, None)


def _store(tile: main_loop.Tile, acc, release, inputs, outputs, scratch, *, scaled, biased) -> None:
    """Scales an accumulator, (128 columns of y, tokens), and stores the expert's tokens of it, transposed."""
    _, expert_scale_E, *optional = inputs
    (out,), buffer, layout = outputs, scratch["out"], plgpu.Layout.TCGEN05_TMEM_NATIVE
    columns = pl.ds(tile.column * TILE_M, TILE_M)
    y_NT = plgpu.async_load_tmem(acc, layout=layout)
    release()
    factor = expert_scale_E[tile.expert]
    first = tile.block * acc.shape[1]
    if scaled:
        rows = optional[0].at[pl.ds(first, acc.shape[1])]
        row_T = plgpu.load(rows, layout=layout.reduce(0), optimized=False)
        factor = lax.broadcast_in_dim(row_T * factor, acc.shape, (1,))
    y_NT = y_NT * factor
    if biased:
        bias_N = plgpu.load(
            optional[-1].at[tile.expert, columns], layout=layout.reduce(1), optimized=False
        )
        y_NT = y_NT + lax.broadcast_in_dim(bias_N.astype(jnp.float32), acc.shape, (0,))
    # The copies of the tile before, which read the buffer.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    y_NT = plgpu.layout_cast(y_NT.astype(buffer.dtype), layout(1))
    plgpu.store(buffer.transpose((1, 0)), y_NT, optimized=False)
    plgpu.commit_smem()
    row_copies.store_rows(buffer, out, tile.first_row, first + tile.first_row, tile.rows, columns)


def _zero_the_rest(share, shares, inputs, outputs, scratch) -> None:
    """Writes zeros into the rows beyond the groups, pieces of tile_t rows and 128 columns in turn."""
    used, (out,), buffer = inputs[0][0], outputs, scratch["out"]
    (num_rows, num_columns), height = out.shape, buffer.shape[0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)
    plgpu.commit_smem()
    across = jnp.int32(num_columns // TILE_M)

    def zero(i, _):
        piece = share + i * shares
        to = used + lax.div(piece, across) * height
        columns = pl.ds(lax.rem(piece, across) * TILE_M, TILE_M)
        row_copies.store_rows(buffer, out, 0, to, jnp.minimum(num_rows - to, height), columns)

    pieces = lax.div(num_rows - used + height - 1, jnp.int32(height)) * across
    lax.fori_loop(0, lax.div(jnp.maximum(pieces - share, 0) + shares - 1, shares), zero, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
