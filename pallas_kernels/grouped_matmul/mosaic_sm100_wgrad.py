"""Weight gradients with FP4 operands on data-centre Blackwell: dw[e] = dy_e^T x_e. Pallas Mosaic GPU.

Roles and buffers are those of `mosaic_sm100_loop`: the gradients take the place of its rows, the activations that of
its weights. Each SM takes every num_sms-th output tile, the experts with most tokens first. A k-step is a unit of 256
tokens and a tile has as many as its expert, so the place in the ring is a count of steps that runs over tiles. An
expert without tokens has no step, and its accumulator holds what was there before: zeros are stored without a look.

Compiled for these GPUs and run in interpret mode; not yet run on hardware.

N outputs, K inputs, E experts, V units of W = 256 tokens, C = scales of a column of a unit / 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import FORMATS, BlockScaled, arranged
from pallas_kernels.grouped_matmul import mosaic_sm100_loop as main_loop
from pallas_kernels.grouped_matmul.mosaic_sm100_tiling import TILE_M, Tiling

__all__ = ["UNIT", "Tiling", "Work", "default_tiling", "schedule", "weight_gradient_codes"]

UNIT = 256  # tokens of a k-step: 128 bytes of codes, as tiles are swizzled by
OUT_DTYPES = (jnp.float32, jnp.bfloat16)


def default_tiling(out_dtype: jnp.dtype) -> Tiling:
    """Returns a tiling that fits every shape the kernel takes."""
    return Tiling(epilogue_n=128 // jnp.dtype(out_dtype).itemsize, group_order=8)


class Work(NamedTuple):
    """The experts in the order in which their tiles are computed.

    Attributes:
      expert_E: int32, whose tiles they are.
      first_unit_E: int32, where its units begin.
      units_E: int32, how many it has.
      count: int32 scalar, E: their tiles are always as many.
    """

    expert_E: jax.Array
    first_unit_E: jax.Array
    units_E: jax.Array
    count: jax.Array


def schedule(sizes_E: jax.Array, num_units: int) -> Work:
    """Orders experts by falling number of units, so that SMs which take tiles in turn share the k-steps evenly.

    Every expert has the same number of tiles, of units_E steps each. In this order no SM has more steps than another by
    more than those of one tile of the largest expert, whatever the sizes.

    Args:
      sizes_E: int32, padded tokens of each group, multiples of 256.
      num_units: V; groups end there, if their sizes say more.
    """
    end_E = jnp.minimum(jnp.cumsum(sizes_E.astype(jnp.int32) // UNIT), num_units)
    first_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
    units_E = end_E - first_E
    expert_E = jnp.arange(units_E.shape[0], dtype=jnp.int32)
    # Comparisons of all pairs, which XLA fuses, instead of a sort, which is a loop of small kernels.
    larger = units_E[:, None] > units_E[None, :]
    tied = (units_E[:, None] == units_E[None, :]) & (expert_E[:, None] < expert_E[None, :])
    rank_E = jnp.sum(larger | tied, axis=0, dtype=jnp.int32)
    chosen = rank_E[None, :] == expert_E[:, None]
    fields = (expert_E, first_E, units_E)
    in_order = (jnp.sum(jnp.where(chosen, field[None, :], 0), axis=1) for field in fields)
    return Work(*in_order, count=jnp.int32(expert_E.shape[0]))


def weight_gradient_codes(
    dy_VNW: BlockScaled,
    x_VKW: BlockScaled,
    group_sizes_padded_E: jax.Array,
    *,
    expert_scale_E: jax.Array,
    out_dtype: jnp.dtype,
    tiling: Tiling,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """dw[e] = cast(expert_scale[e] * sum over e's units v of dy[v] x[v]^T), exactly zero where there is none.

    Global scales of NVFP4 are left to expert_scale_E: `global_amax` is not read here.

    Args:
      dy_VNW: output gradients quantized along the tokens in units of 256, each of one expert
        (`transposed_operands.widen`); 4-bit, N a multiple of 128. Scales may be "linear" or "tcgen05".
      x_VKW: activations likewise, in a format of dy's block and scales, K a multiple of tile_n.
      group_sizes_padded_E: int32, tokens of each expert's units, which follow each other from unit 0 on.
      expert_scale_E: float32, product of the operands' global scales (`transposed_operands.expert_scale`).
      out_dtype: float32 or bfloat16; sums are float32 and cast once.
      tiling: sizes, within the budgets; tile_k is 256, and it is not collective. Whole tiles are stored, always from
        swizzled buffers.
      num_sms: streaming multiprocessors to use.
      interpret: parameters of interpret mode, or None for a GPU.

    Returns:
      out_dtype (E, N, K).

    Raises:
      ValueError: shapes, formats or dtypes that do not go together, or a tiling that does not fit.
    """
    out_dtype = jnp.dtype(out_dtype)
    _check(dy_VNW, x_VKW, group_sizes_padded_E, expert_scale_E, out_dtype, tiling, num_sms)
    (num_units, outputs, _), inputs = dy_VNW.shape, x_VKW.shape[1]
    out_type = jax.ShapeDtypeStruct((group_sizes_padded_E.shape[0], outputs, inputs), out_dtype)
    if not num_units:  # nothing that TMA could read
        return jnp.zeros(out_type.shape, out_dtype)
    epilogue = main_loop.Epilogue(
        inputs=(expert_scale_E,),
        out_type=(out_type,),
        scratch={"out": _stored(tiling, out_dtype)},
        num_columns=inputs // tiling.tile_n,
        boxes=lambda column: (column * tiling.tile_n,),
        store=functools.partial(_store, tiling=tiling),
        finish=lambda *_: plgpu.wait_smem_to_gmem(0, wait_read_only=True),
    )
    return main_loop.run(
        main_loop.Operands(*_for_tma(dy_VNW), *_for_tma(x_VKW)),
        schedule(group_sizes_padded_E, num_units),
        epilogue,
        tiling,
        format=dy_VNW.format,
        num_sms=num_sms,
        name=f"weight_gradient_{dy_VNW.format}",
        interpret=interpret,
        loop=_Loop,
    )[0]


def _for_tma(q: BlockScaled) -> tuple[jax.Array, jax.Array]:
    """Returns codes and tiles of scales in their own dtypes: no byte of codes moves."""
    codes = lax.bitcast_convert_type(q.codes, jnp.float4_e2m1fn).reshape(q.shape)
    scales = arranged(q, "tcgen05").scales
    return codes, lax.bitcast_convert_type(scales, main_loop.scale_dtype(q.format))


def _stored(tiling: Tiling, out_dtype: jnp.dtype) -> plgpu.SMEM:
    """Two buffers of columns on their way out, in rows of at most 128 bytes, swizzled against bank conflicts."""
    width = min(tiling.epilogue_n, 128 // out_dtype.itemsize)
    transforms = (
        plgpu.TilingTransform((8, width)),
        plgpu.SwizzleTransform(width * out_dtype.itemsize),
    )
    return plgpu.SMEM((2, TILE_M, tiling.epilogue_n), out_dtype, transforms=transforms)


class _Tile(NamedTuple):
    """An output tile, int32 scalars.

    Attributes:
      expert: whose it is.
      first_unit: where the expert's units begin.
      steps: how many it has.
      row: index of the tile along the outputs.
      column: along the inputs.
      first_step: how many steps the SM's tiles before this one have.
    """

    expert: Any
    first_unit: Any
    steps: Any
    row: Any
    column: Any
    first_step: Any


class _Loop(main_loop.Loop):
    """The roles, over tiles with a number of steps of their own."""

    def load(self, data: main_loop.Operands) -> None:
        """Fills the ring with units of gradients and activations."""
        width = self.tiling.tile_n

        @self._over_tiles
        def _(_local_index, tile):
            rows, row_atom = pl.ds(tile.row * TILE_M, TILE_M), pl.ds(tile.row, 1)
            columns = pl.ds(tile.column * width, width)
            atoms = pl.ds(tile.column * (width // 128), width // 128)

            def step(k, _):
                stage = self._wait_to_load(tile.first_step + k)
                unit = tile.first_unit + k
                for source, buffer in (
                    (data.x_TK.at[unit, rows], self.x),
                    (data.x_scales.at[unit, row_atom], self.x_scales),
                    (data.w_ENK.at[unit, columns], self.w),
                    (data.w_scales.at[unit, atoms], self.w_scales),
                ):
                    plgpu.copy_gmem_to_smem(source, buffer.at[stage], self.full.at[stage])

            lax.fori_loop(0, tile.steps, step, None)

    def multiply(self, depth: int) -> None:
        """Issues the MMAs of each tile's units; a tile without any is handed on at once."""

        @self._over_tiles
        def _(local_index, tile):
            slot = self._slot(local_index)

            @pl.when(local_index >= self.tiling.accumulators)
            def _():
                plgpu.barrier_wait(self.acc_empty.at[slot])

            def step(k, _):
                stage = lax.rem(tile.first_step + k, jnp.int32(self.tiling.stages))
                self._multiply_stage(k, stage, self._accumulator(slot))

            lax.fori_loop(0, tile.steps, step, None)
            plgpu.tcgen05_commit_arrive(self.acc_full.at[slot])

    def _over_tiles(self, body: Callable[[jax.Array, _Tile], None]) -> None:
        (dw,) = self.epilogue.out_type
        shape = (dw.shape[1] // TILE_M, self.epilogue.num_columns)

        @plgpu.nd_loop(
            (dw.shape[0], shape[0] * shape[1]),
            collective_axes=main_loop._SM,
            init_carry=jnp.int32(0),
        )
        def _(info, carry):
            rank, index = info.index
            expert, first_unit, steps = (self.tile_I4[rank, field] for field in range(3))
            row, column = plgpu.planar_snake(index, shape, 0, self.tiling.group_order)
            body(info.local_index, _Tile(expert, first_unit, steps, row, column, carry))
            return carry + steps


def _store(tile: _Tile, acc, release, inputs, outputs, scratch, *, tiling: Tiling) -> None:
    """Scales an accumulator by columns of epilogue_n and stores them; zeros where nothing was accumulated."""
    width, chunks = tiling.epilogue_n, tiling.tile_n // tiling.epilogue_n
    scale = inputs[0][tile.expert]
    for chunk in range(chunks):
        part, buffer = acc.at[:, pl.ds(chunk * width, width)], scratch["out"].at[chunk % 2]
        # The copy that reads this buffer two chunks ago.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)

        @pl.when(tile.steps > 0)
        def _(part=part, buffer=buffer):
            total = plgpu.async_load_tmem(part, layout=plgpu.Layout.TCGEN05)
            buffer[...] = (total * scale).astype(buffer.dtype)

        @pl.when(tile.steps == 0)
        def _(buffer=buffer):
            buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)

        if chunk == chunks - 1:
            release()
        plgpu.commit_smem()
        rows = pl.ds(tile.row * TILE_M, TILE_M)
        columns = pl.ds(tile.column * tiling.tile_n + chunk * width, width)
        plgpu.copy_smem_to_gmem(buffer, outputs[0].at[tile.expert, rows, columns])


def _check(
    dy: BlockScaled,
    x: BlockScaled,
    sizes_E: jax.Array,
    expert_scale_E: jax.Array,
    out_dtype: jnp.dtype,
    tiling: Tiling,
    num_sms: int,
) -> None:
    specs = [FORMATS[q.format] for q in (dy, x)]
    if any(s.element.bits != 4 or s.float_scales for s in specs):
        raise ValueError(f"needs NVFP4 or MXFP4 operands, got {dy.format} dy and {x.format} x")
    if (specs[0].scale, specs[0].block) != (specs[1].scale, specs[1].block):
        raise ValueError(f"dy and x need scales of one kind, got {dy.format} dy and {x.format} x")
    shapes = dy.shape, x.shape
    if dy.ndim != 3 or x.ndim != 3 or {s[2] for s in shapes} != {UNIT} or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"needs dy (V, N, {UNIT}) and x (V, K, {UNIT}), got {shapes[0]} and {shapes[1]}"
        )
    if dy.shape[1] % TILE_M or x.shape[1] % tiling.tile_n:
        raise ValueError(
            f"N must be a multiple of {TILE_M} and K of tile_n = {tiling.tile_n}, got N = {dy.shape[1]} and "
            f"K = {x.shape[1]}: pad the columns of dy and x"
        )
    expected = {
        "group_sizes_padded_E": (sizes_E, jnp.int32),
        "expert_scale_E": (expert_scale_E, jnp.float32),
    }
    for name, (array, dtype) in expected.items():
        if (
            array.ndim != 1
            or array.shape != sizes_E.shape
            or not array.size
            or array.dtype != dtype
        ):
            raise ValueError(
                f"{name} must be {jnp.dtype(dtype).name} (E,), got {array.dtype.name} {array.shape}"
            )
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be float32 or bfloat16, got {out_dtype}")
    if num_sms < 1:
        raise ValueError(f"num_sms must be at least 1, got {num_sms}")
    if tiling.tile_k != UNIT or tiling.collective:
        raise ValueError(f"needs tile_k = {UNIT} and collective = False, got {tiling}")
    tiling.check_budgets(dy.format, out_dtype)
