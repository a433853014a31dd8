"""The main loop of block-scaled grouped matmuls on data-centre Blackwell: loads and MMAs, for any epilogue.

Persistent: each CTA (or pair, if collective) takes every num_sms-th tile. Three roles run through the same tiles at
their own pace, a ring of stages and a pair of accumulators between them:

    warp 0        TMA: codes and scales of a k-step -> shared memory             waits empty, arrives full
    warp 1        scales -> tensor memory, then the MMA                          waits full, arrives empty, acc_full
    warpgroup 1   the epilogue: tensor memory -> registers -> global memory      waits acc_full, arrives acc_empty

Nothing drains between tiles. Rows of other experts in a block of 128 are multiplied too and not stored.

T rows, K contraction axis, N weight rows, E experts, I tiles, C = scales of a row / 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import private_jax
from pallas_kernels.formats import FORMATS
from pallas_kernels.grouped_matmul.mosaic_sm100_epilogue import Epilogue, Operands, Tile
from pallas_kernels.grouped_matmul.mosaic_sm100_tiling import TILE_M, Tiling
from pallas_kernels.grouped_matmul.tiles import Tiles

Ref = Any  # Pallas has no public name for it
_SM, _CTA, _ROLE = "sm", "cta", "role"  # grid, cluster and warpgroup axes
_TMA_WARP, _MMA_WARP = 0, 1
_MAIN_WARPGROUP, _EPILOGUE_WARPGROUP = 0, 1
WARPGROUP = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def run(
    operands: Operands,
    tiles: Tiles,
    epilogue: Epilogue,
    tiling: Tiling,
    *,
    format: str,
    num_sms: int,
    name: str,
    interpret: plgpu.InterpretGPUParams | None,
    loop: type[Loop] | None = None,
    compiler_params: plgpu.CompilerParams = WARPGROUP,
) -> tuple[jax.Array, ...]:
    """Launches the kernel; the caller has checked shapes and budgets.

    Args:
      operands: arrays.
      tiles: schedule with tile_rows = tiling.tile_m, or what `loop` goes by, the count last.
      epilogue: what to do with accumulators.
      tiling: sizes.
      format: of the operands.
      num_sms: CTAs to launch, one per streaming multiprocessor.
      name: of the kernel.
      interpret: parameters of interpret mode, or None for a GPU.
      loop: Loop, or one with other tiles and k-steps over the same buffers.
      compiler_params: Lane semantics, for example, for an epilogue that says which thread holds what.

    Returns:
      The epilogue's outputs.
    """
    if interpret is not None:
        private_jax.interpret_block_scaled()
        private_jax.compile_interpreted_threads_once()
    num_inputs, num_outputs = len(epilogue.inputs), len(epilogue.out_type)

    def body(tile_I4, count, *refs, **scratch):
        data = Operands(*refs[:4])
        inputs = refs[4 : 4 + num_inputs]
        outputs = refs[4 + num_inputs : 4 + num_inputs + num_outputs]
        own = {name: scratch.pop(name) for name in epilogue.scratch}
        roles = (loop or Loop)(tiling, format, epilogue, tile_I4, count, **scratch)
        role = lax.axis_index(_ROLE)

        @pl.when(role == _MAIN_WARPGROUP)
        def _():
            @plgpu.warp_map
            def _(warp):
                pl.when(warp == _TMA_WARP)(lambda: roles.load(data))
                pl.when(warp == _MMA_WARP)(lambda: roles.multiply(data.x_TK.shape[1]))

        @pl.when(role == _EPILOGUE_WARPGROUP)
        def _():
            roles.store(inputs, outputs, own)

    cluster = {"cluster": (2,), "cluster_names": (_CTA,)} if tiling.collective else {}
    kernel = plgpu.kernel(
        body,
        out_type=epilogue.out_type,
        scratch_types=_buffers(tiling, format, len(epilogue.boxes(0))) | epilogue.scratch,
        grid=(num_sms // tiling.num_ctas,),
        grid_names=(_SM,),
        num_threads=2,
        thread_name=_ROLE,
        kernel_name=name,
        compiler_params=compiler_params,
        interpret=interpret,
        **cluster,
    )
    tile_I4 = jnp.stack(tiles[:-1], axis=1)
    return kernel(tile_I4, tiles.count.reshape(1), *operands, *epilogue.inputs)


def _buffers(tiling: Tiling, format: str, num_boxes: int) -> dict[str, Any]:
    """Shared and tensor memory and barriers of the loop."""
    scale = scale_dtype(format)
    stages, columns = tiling.stages, tiling.scale_columns(format)
    swizzled = (plgpu.TilingTransform((8, 256)), plgpu.SwizzleTransform(128))

    def codes(rows):
        shape = (stages, rows, tiling.tile_k)
        return plgpu.SMEM(shape, jnp.float4_e2m1fn, transforms=swizzled)

    # Scales come in tiles of 128 rows, however few of them are used.
    def scales(rows):
        return plgpu.SMEM((stages, pl.cdiv(rows, 128), columns // 4, 32, 16), scale)

    def tmem_scales(rows):
        shape, layout = (pl.cdiv(rows, 128) * 128, columns), plgpu.TMEMLayout.SCALES_LAYOUT
        return plgpu.TMEM(shape, scale, layout=layout, collective=tiling.collective)

    def barrier(count, arrivals=1, tensor_core=True):
        return plgpu.Barrier(
            num_arrivals=arrivals, num_barriers=count, orders_tensor_core=tensor_core
        )

    acc_empty = barrier(tiling.accumulators)
    if tiling.collective:
        acc_empty = plgpu.ClusterBarrier(
            collective_axes=(_CTA,),
            num_arrivals=1,
            num_barriers=tiling.accumulators,
            orders_tensor_core=True,
        )
    return {
        "x": codes(TILE_M),
        "w": codes(tiling.loaded_n),
        "x_scales": scales(TILE_M),
        "w_scales": scales(tiling.tile_n),
        "x_scales_t": tmem_scales(TILE_M),
        "w_scales_t": tmem_scales(tiling.tile_n),
        "acc": plgpu.TMEM(
            (TILE_M, tiling.tile_n * tiling.accumulators),
            jnp.float32,
            collective=tiling.collective,
        ),
        # One arrival per copy: codes and scales of the rows, and of each box of weights.
        "full": barrier(stages, arrivals=2 + 2 * num_boxes, tensor_core=False),
        "empty": barrier(stages),
        "acc_full": barrier(tiling.accumulators),
        "acc_empty": acc_empty,
    }


@dataclasses.dataclass(frozen=True)
class Loop:
    """The three roles, over the same references."""

    tiling: Tiling
    format: str
    epilogue: Epilogue
    tile_I4: Ref
    count: Ref
    x: Ref
    w: Ref
    x_scales: Ref
    w_scales: Ref
    x_scales_t: Ref
    w_scales_t: Ref
    acc: Ref
    full: Ref
    empty: Ref
    acc_full: Ref
    acc_empty: Ref

    def load(self, data: Operands) -> None:
        """Fills the ring: waits until a stage's MMA is done, then starts the copies of a k-step."""
        num_steps = data.x_TK.shape[1] // self.tiling.tile_k

        @self._over_tiles
        def _(local_index, tile):
            boxes = self.epilogue.boxes(tile.column)

            def step(k, _):
                stage = self._wait_to_load(local_index * num_steps + k)
                self._copy_rows(data, tile, k, stage)
                for box, first in enumerate(boxes):
                    self._copy_weights(data, tile, k, stage, box, first)

            lax.fori_loop(0, num_steps, step, None)

    def _wait_to_load(self, step: jax.Array) -> jax.Array:
        stage = lax.rem(step, jnp.int32(self.tiling.stages))

        @pl.when(step >= self.tiling.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[stage])

        return stage

    def _copy_rows(self, data: Operands, tile: Tile, k: jax.Array, stage: jax.Array) -> None:
        pair = self._copies(plgpu.CopyPartition.PARTITIONED(0))
        rows = pl.ds(tile.block * self.tiling.tile_m, self.tiling.tile_m)
        plgpu.copy_gmem_to_smem(
            data.x_TK.at[rows, self._columns(k)], self.x.at[stage], self.full.at[stage], **pair
        )
        atoms = pl.ds(tile.block * self.tiling.num_ctas, self.tiling.num_ctas)
        plgpu.copy_gmem_to_smem(
            data.x_scales.at[atoms, self._scale_columns(k)],
            self.x_scales.at[stage],
            self.full.at[stage],
            **pair,
        )

    def _copy_weights(
        self, data: Operands, tile: Tile, k: jax.Array, stage: jax.Array, box: int, first: jax.Array
    ) -> None:
        rows = self.tiling.tile_n // len(self.epilogue.boxes(0))
        whole = rows == self.tiling.tile_n
        into = self.w.at[stage]
        scales_into = self.w_scales.at[stage]
        if not whole:
            into = into.at[pl.ds(box * rows, rows)]
            scales_into = scales_into.at[pl.ds(box * rows // 128, rows // 128)]
        plgpu.copy_gmem_to_smem(
            data.w_ENK.at[tile.expert, pl.ds(first, rows), self._columns(k)],
            into,
            self.full.at[stage],
            **self._copies(plgpu.CopyPartition.PARTITIONED(0)),
        )
        atoms = pl.ds(lax.div(first, jnp.int32(128)), rows // 128)
        plgpu.copy_gmem_to_smem(
            data.w_scales.at[tile.expert, atoms, self._scale_columns(k)],
            scales_into,
            self.full.at[stage],
            **self._copies(plgpu.CopyPartition.REPLICATED),
        )

    def multiply(self, depth: int) -> None:
        """Issues copies of scales and MMAs. They run in the order of issue, so one buffer of scales is enough."""
        num_steps = depth // self.tiling.tile_k
        axis = self._pair

        def product(local_index, slot):
            acc = self._accumulator(slot)

            def step(k, _):
                stage = lax.rem(local_index * num_steps + k, jnp.int32(self.tiling.stages))
                self._multiply_stage(k, stage, acc)

            lax.fori_loop(0, num_steps, step, None)
            plgpu.tcgen05_commit_arrive(self.acc_full.at[slot], collective_axis=axis)

        @self._over_tiles
        def _(local_index, _tile):
            slot = self._slot(local_index)

            @pl.when(local_index >= self.tiling.accumulators)
            def _():
                plgpu.barrier_wait(self.acc_empty.at[slot])

            if self.tiling.collective:
                # The leader multiplies for both.
                pl.when(lax.axis_index(_CTA) == 0)(lambda: product(local_index, slot))
            else:
                product(local_index, slot)

    def _multiply_stage(self, k: jax.Array, stage: jax.Array, acc: Ref) -> None:
        """Adds a k-step's product to acc, or begins with it at k = 0, once the stage is full; frees it when done."""
        plgpu.barrier_wait(self.full.at[stage])
        for smem, tmem in (
            (self.x_scales, self.x_scales_t),
            (self.w_scales, self.w_scales_t),
        ):
            plgpu.async_copy_scales_to_tmem(smem.at[stage], tmem, collective_axis=self._pair)
        plgpu.tcgen05_mma(
            acc,
            self.x.at[stage],
            self.w.at[stage].transpose((1, 0)),
            self.empty.at[stage],
            a_scale=self.x_scales_t,
            b_scale=self.w_scales_t,
            accumulate=k > 0,
            collective_axis=self._pair,
        )

    @property
    def _pair(self) -> str | None:
        return _CTA if self.tiling.collective else None

    def store(self, inputs, outputs, scratch) -> None:
        """Hands each finished accumulator to the epilogue."""

        @self._over_tiles
        def _(local_index, tile):
            slot = self._slot(local_index)

            def release():
                plgpu.wait_load_tmem()
                plgpu.barrier_arrive(self.acc_empty.at[slot])

            plgpu.barrier_wait(self.acc_full.at[slot])
            acc, mine = self._accumulator(slot), self._my_half(tile)
            self.epilogue.store(mine, acc, release, inputs, outputs, scratch)

        share, shares = lax.axis_index(_SM), lax.axis_size(_SM)
        if self.tiling.collective:
            share, shares = share * 2 + lax.axis_index(_CTA), shares * 2
        self.epilogue.finish(share, shares, inputs, outputs, scratch)

    def _over_tiles(self, body: Callable[[jax.Array, Tile], None]) -> None:
        """Runs body(how many tiles came before here, tile) over this CTA's tiles."""
        count = self.count[0]

        @plgpu.nd_loop(grid=(count * self.epilogue.num_columns,), collective_axes=_SM)
        def _(info):
            shape = (count, self.epilogue.num_columns)
            i, column = plgpu.planar_snake(info.index[0], shape, 0, self.tiling.group_order)
            body(info.local_index, Tile(*(self.tile_I4[i, field] for field in range(4)), column, i))

    def _my_half(self, tile: Tile) -> Tile:
        """Of a tile that two CTAs share, the block and rows of this one."""
        if not self.tiling.collective:
            return tile
        cta = lax.axis_index(_CTA)

        def inside(row):
            return jnp.clip(row - cta * TILE_M, 0, TILE_M)

        first, stop = inside(tile.first_row), inside(tile.first_row + tile.rows)
        return tile._replace(block=tile.block * 2 + cta, first_row=first, rows=stop - first)

    def _slot(self, local_index: jax.Array) -> jax.Array:
        return lax.rem(local_index, jnp.int32(self.tiling.accumulators))

    def _accumulator(self, slot: jax.Array) -> Ref:
        return self.acc.at[:, pl.ds(slot * self.tiling.tile_n, self.tiling.tile_n)]

    def _columns(self, k: jax.Array) -> pl.Slice:
        return pl.ds(k * self.tiling.tile_k, self.tiling.tile_k)

    def _scale_columns(self, k: jax.Array) -> pl.Slice:
        atoms = self.tiling.scale_columns(self.format) // 4
        return pl.ds(k * atoms, atoms)

    def _copies(self, partition: Any) -> dict[str, Any]:
        if not self.tiling.collective:
            return {}
        return {"collective_axes": _CTA, "leader_tracked": partition}


def scale_dtype(format: str) -> jnp.dtype:
    """The dtype that tells tensor cores a format's scales."""
    return jnp.float8_e4m3fn if FORMATS[format].scale == "e4m3" else jnp.float8_e8m0fnu
