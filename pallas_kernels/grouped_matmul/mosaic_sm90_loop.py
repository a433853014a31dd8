"""The kernel of Hopper's weight-only grouped matmul: loads, decoding, `wgmma`, and the way out.

Persistent: each CTA takes every num_sms-th tile. One warpgroup loads, one or two multiply 64 weight rows each, at
their own pace, a ring of stages between them:

    last warpgroup     TMA: words, scales and rows of x of a step     waits empty, arrives full
    other warpgroups   shared memory -> registers, decode, wgmma      wait full, arrive empty

The product is transposed: weights are the M side of `wgmma`, whose left operand may come from registers, and rows of x
its N side, which may be as few as 8. The ring does not drain between tiles.

T rows of x, P of aligned groups, K contraction axis, N weight rows, E experts, B blocks and C words along K, I tiles.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import private_wgmma
from pallas_kernels.formats import FORMATS
from pallas_kernels.grouped_matmul import mosaic_sm90_decode as decode
from pallas_kernels.grouped_matmul import row_copies
from pallas_kernels.grouped_matmul.mosaic_sm90_rows import ALIGNMENT, RowTiles
from pallas_kernels.grouped_matmul.mosaic_sm90_tiling import ROWS, Tiling

Ref = Any  # Pallas has no public name for it
_SM, _ROLE = "sm", "role"  # grid and warpgroup axes
_LOADING_REGISTERS = 40
_COPIES = 3  # of a step: words, scales, rows of x


@dataclasses.dataclass(frozen=True)
class Operands:
    """What the kernel reads; in the kernel, references to it.

    Attributes:
      tile_I4: int32 (I, 4): the fields of RowTiles.
      counts_2: int32 (2,): how many tiles there are, and how many rows of experts.
      factor_E: float32 (E,), of an expert's products.
      word_ENC: uint16 (E, N, K / 4).
      scale_EBN: float8_e4m3fn, or uint8 with E8M0 bits.
      x_PK: bfloat16, at least tile_n rows, groups aligned, columns in the order of `decode.interleaved`.
      row_scale_T: float32 (T + tile_n,), or None.
      bias_EN: float32, or None.
    """

    tile_I4: Any
    counts_2: Any
    factor_E: Any
    word_ENC: Any
    scale_EBN: Any
    x_PK: Any
    row_scale_T: Any
    bias_EN: Any


class Tile(NamedTuple):
    """One tile, int32 scalars: the fields of RowTiles, and its first weight row."""

    expert: Any
    row: Any
    aligned: Any
    rows: Any
    column: Any


def run(
    operands: Operands,
    out_type: jax.ShapeDtypeStruct,
    tiling: Tiling,
    *,
    format: str,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None,
) -> jax.Array:
    """Launches the kernel; the caller has checked shapes and budgets.

    Args:
      operands: arrays.
      out_type: (T, N).
      tiling: sizes.
      format: of the weights.
      num_sms: CTAs to launch.
      interpret: parameters of interpret mode, or None for a GPU.
    """
    if interpret is not None:
        private_wgmma.interpret_wgmma_from_registers()
    given = {
        field.name: getattr(operands, field.name)
        for field in dataclasses.fields(Operands)
        if getattr(operands, field.name) is not None
    }
    absent = {field.name: None for field in dataclasses.fields(Operands) if field.name not in given}

    def body(*refs, **scratch):
        data = Operands(**dict(zip(given, refs[:-1], strict=True)), **absent)
        roles = Roles(data, refs[-1], tiling, format, interpret is not None, **scratch)
        role = lax.axis_index(_ROLE)
        pl.when(role == tiling.warpgroups)(roles.load)
        pl.when(role < tiling.warpgroups)(lambda: roles.multiply(role))

    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=_buffers(tiling, format, operands.scale_EBN.dtype, out_type.dtype),
        grid=(num_sms,),
        grid_names=(_SM,),
        num_threads=tiling.warpgroups + 1,
        thread_name=_ROLE,
        kernel_name=f"grouped_w4a16_{format}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return kernel(*given.values())


def _buffers(
    tiling: Tiling, format: str, scale_dtype: jnp.dtype, out_dtype: jnp.dtype
) -> dict[str, Any]:
    """Shared memory and barriers."""
    stages, width = tiling.stages, tiling.words
    # Rows of `words` 16-bit elements are what both operands are swizzled by: 32, 64 or 128 bytes.
    swizzled = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
    return {
        "words": plgpu.SMEM((stages, tiling.tile_m, width), jnp.uint16, transforms=swizzled),
        "scales": plgpu.SMEM((stages, tiling.scale_rows(format), tiling.tile_m), scale_dtype),
        "x": plgpu.SMEM((stages, tiling.tile_n, tiling.tile_k), jnp.bfloat16, transforms=swizzled),
        # Not swizzled: groups end at any row, and swizzled tiles are 8 rows high.
        "out": plgpu.SMEM((tiling.warpgroups, tiling.tile_n, ROWS), out_dtype),
        "full": plgpu.Barrier(num_arrivals=_COPIES, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=stages),
    }


@dataclasses.dataclass(frozen=True)
class Roles:
    """What the warpgroups do, over the same references."""

    data: Operands
    out_TN: Ref
    tiling: Tiling
    format: str
    interpreted: bool
    words: Ref
    scales: Ref
    x: Ref
    out: Ref
    full: Ref
    empty: Ref

    @property
    def _num_steps(self) -> int:
        return self.data.x_PK.shape[1] // self.tiling.tile_k

    def _over_tiles(self, visit) -> None:
        """Calls visit(steps before this tile, tile) for each of this CTA's."""
        columns = self.data.word_ENC.shape[1] // self.tiling.tile_m

        @plgpu.nd_loop((self.data.counts_2[0] * columns,), collective_axes=_SM)
        def _(info):
            (index,) = info.index
            # Tiles of one expert's rows follow each other: its weights are in L2 from the first one.
            tile, column = lax.div(index, jnp.int32(columns)), lax.rem(index, jnp.int32(columns))
            fields = (self.data.tile_I4[tile, i] for i in range(4))
            visit(info.local_index * self._num_steps, Tile(*fields, column * self.tiling.tile_m))

    def _stage(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.tiling.stages))

    def load(self) -> None:
        """Fills the ring: waits until a stage is free, then starts the copies of a step."""
        plgpu.set_max_registers(_LOADING_REGISTERS, action="decrease")
        tiling, data = self.tiling, self.data

        def load_tile(before, tile):
            weights = pl.ds(tile.column, tiling.tile_m)
            rows = pl.ds(pl.multiple_of(tile.aligned, ALIGNMENT), tiling.tile_n)

            def step(k, _):
                stage = self._stage(before + k)

                @pl.when(before + k >= tiling.stages)
                def _():
                    plgpu.barrier_wait(self.empty.at[stage])

                blocks = tiling.scale_rows(self.format)
                full = self.full.at[stage]
                plgpu.copy_gmem_to_smem(
                    data.word_ENC.at[tile.expert, weights, pl.ds(k * tiling.words, tiling.words)],
                    self.words.at[stage],
                    full,
                )
                plgpu.copy_gmem_to_smem(
                    data.scale_EBN.at[tile.expert, pl.ds(k * blocks, blocks), weights],
                    self.scales.at[stage],
                    full,
                )
                plgpu.copy_gmem_to_smem(
                    data.x_PK.at[rows, pl.ds(k * tiling.tile_k, tiling.tile_k)],
                    self.x.at[stage],
                    full,
                )

            lax.fori_loop(0, self._num_steps, step, None)

        self._over_tiles(load_tile)

    def multiply(self, warpgroup: jax.Array) -> None:
        """Multiplies 64 weight rows of each tile, and stores the product."""
        plgpu.set_max_registers(_registers(self.tiling.warpgroups), action="increase")

        def multiply_tile(before, tile):
            def product(acc):
                step = functools.partial(self._multiply_stage, acc, warpgroup, before)
                lax.fori_loop(0, self._num_steps, step, None)
                return acc[...]

            acc_NT = pl.run_scoped(product, plgpu.ACC((ROWS, self.tiling.tile_n), jnp.float32))
            self._store(acc_NT, warpgroup, tile)

        self._over_tiles(multiply_tile)
        pl.when(self.data.counts_2[1] < self.out_TN.shape[0])(lambda: self._zero_rest(warpgroup))
        plgpu.wait_smem_to_gmem(0)

    def _multiply_stage(self, acc: Ref, warpgroup: jax.Array, before: jax.Array, k, _) -> None:
        """Adds a step's product to acc: each code's product runs while the next code is decoded.

        Nothing stays in flight from one step to the next: ptxas would then wait after every single instruction.
        """
        stage, width = self._stage(before + k), self.tiling.words
        plgpu.barrier_wait(self.full.at[stage])
        mine = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
        word_MC = self.words[stage, mine]
        block = FORMATS[self.format].block
        scale_MC = decode.scales(self.scales.at[stage, :, mine], width, block)
        for code in range(decode.CODES):
            a_MC = decode.values(word_MC, code, scale_MC, interpreted=self.interpreted)
            x_TC = self.x.at[stage, :, pl.ds(code * width, width)]
            plgpu.wgmma(acc, a_MC, x_TC.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        self._free(before + k)

    def _free(self, step: jax.Array) -> None:
        """Gives a step's stage back to the loader. Registers were read from it too, before TMA overwrites them."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.empty.at[self._stage(step)])

    def _store(self, acc_NT: jax.Array, warpgroup: jax.Array, tile: Tile) -> None:
        """Scales a product and stores the expert's rows of it, transposed."""
        shape = (ROWS, self.tiling.tile_n)
        columns = pl.ds(tile.column + warpgroup * ROWS, ROWS)
        factor = self.data.factor_E[tile.expert]
        if self.data.row_scale_T is not None:
            scale_T = self._loaded(self.data.row_scale_T.at[pl.ds(tile.row, shape[1])], axis=0)
            factor = lax.broadcast_in_dim(scale_T * factor, shape, (1,))
        y_NT = acc_NT * factor
        if self.data.bias_EN is not None:
            bias_N = self._loaded(self.data.bias_EN.at[tile.expert, columns], axis=1)
            y_NT = y_NT + lax.broadcast_in_dim(bias_N, shape, (0,))
        buffer = self.out.at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        y_NT = y_NT.astype(buffer.dtype)
        if buffer.dtype.itemsize == 4:
            # 16-bit elements are transposed by `stmatrix`, these by a shuffle.
            y_NT = plgpu.layout_cast(y_NT, plgpu.Layout.WGMMA_TRANSPOSED)
        # "Not optimized" allows bank conflicts: they cost little, once per tile.
        plgpu.store(buffer.transpose((1, 0)), y_NT, optimized=False)
        plgpu.commit_smem()
        row_copies.store_rows(buffer, self.out_TN, 0, tile.row, tile.rows, columns)

    def _zero_rest(self, warpgroup: jax.Array) -> None:
        """Writes zeros into the rows of nobody, pieces of tile_n rows and 64 columns in turn."""
        (num_rows, num_columns), height = self.out_TN.shape, self.tiling.tile_n
        used, buffer = self.data.counts_2[1], self.out.at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)
        plgpu.commit_smem()
        across = jnp.int32(num_columns // ROWS)
        shares = lax.axis_size(_SM) * self.tiling.warpgroups
        share = lax.axis_index(_SM) * self.tiling.warpgroups + warpgroup

        def zero(i, _):
            piece = share + i * shares
            row = used + lax.div(piece, across) * height
            columns = pl.ds(lax.rem(piece, across) * ROWS, ROWS)
            rows = jnp.minimum(num_rows - row, height)
            row_copies.store_rows(buffer, self.out_TN, 0, row, rows, columns)

        pieces = pl.cdiv(num_rows - used, height) * across
        lax.fori_loop(0, pl.cdiv(jnp.maximum(pieces - share, 0), shares), zero, None)

    def _loaded(self, ref: Ref, axis: int) -> jax.Array:
        """Loads a vector from global memory in the layout of an accumulator without this axis."""
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)


def _registers(warpgroups: int) -> int:
    """Registers of a thread that computes: what the loading warpgroup leaves of 512 for one thread of each."""
    return min(256, (512 - _LOADING_REGISTERS) // warpgroups // 8 * 8)


def table(tiles: RowTiles) -> jax.Array:
    """Returns the tiles as the kernel reads them: int32 (I, 4)."""
    return jnp.stack(tiles[:4], axis=1)
