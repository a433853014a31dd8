"""The epilogues of the fused feed-forward on data-centre Blackwell: SwiGLU of an accumulator, as numbers or as codes.

Lane semantics: a thread of the warpgroup holds a row. An accumulator has 128 columns of gate, then those of up.

L 128 rows of a tile, W columns of a chunk, B elements of a block, Q 32 rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import FORMATS, elements
from pallas_kernels.grouped_matmul import mosaic_sm100_loop as main_loop
from pallas_kernels.grouped_matmul import row_copies
from pallas_kernels.grouped_matmul.activation import SwiGLU
from pallas_kernels.grouped_matmul.mosaic_sm100_tiling import TILE_M
from pallas_kernels.quantize import blocks

TILE_F = 128  # columns of the layer between, of a tile: as many rows of gate and of up
CHUNK = 32  # columns that are in registers at a time; 16 bytes of codes


class _Given(NamedTuple):
    """What a tile's sums meet in the epilogue: scalars, or [L, W] of one column; None for none.

    Attributes:
      factor: of sums.
      weight: of act.
      bias_G: reference to the expert's biases.
    """

    factor: Any
    weight: Any
    bias_G: Any


def act_buffers(out_dtype: jnp.dtype) -> Any:
    """Returns the two buffers of `store_act`: shared memory (2, 128, chunks, CHUNK), 128 bytes of every row.

    A chunk is what is swizzled: stored alone, as a part of a longer swizzled row, Pallas would put it elsewhere than
    copies look for it, since it swizzles by the distance from where a store begins and they by the address.
    """
    chunk_bytes = CHUNK * jnp.dtype(out_dtype).itemsize
    shape = (2, TILE_M, 128 // chunk_bytes, CHUNK)
    return plgpu.SMEM(shape, out_dtype, transforms=(plgpu.SwizzleTransform(chunk_bytes),))


def _given(tile: main_loop.Tile, inputs, given) -> _Given:
    """Loads what is the same for all columns of a tile; `given`: whether rows have scales and weights, gates a bias."""
    _, expert_scale_E, *optional = inputs
    optional = iter(optional)
    factor, weight, bias_G = expert_scale_E[tile.expert], None, None

    def load(row_T):
        here = row_T.at[pl.ds(tile.block * TILE_M, TILE_M)]
        return plgpu.load(here, layout=blocks.per_line(), optimized=False)

    if given[0]:
        factor = blocks.spread(load(next(optional)) * factor, CHUNK)
    if given[1]:
        weight = blocks.spread(load(next(optional)), CHUNK)
    if given[2]:
        bias_G = next(optional).at[tile.expert]
    return _Given(factor, weight, bias_G)


def _act(tile: main_loop.Tile, acc, chunk: int, given: _Given, activation: SwiGLU) -> jax.Array:
    """Returns 32 columns of act, float32 [L, W], each line in one thread."""

    def load(box):
        sums = acc.at[:, pl.ds(box * TILE_F + chunk * CHUNK, CHUNK)]
        loaded = plgpu.async_load_tmem(sums, layout=plgpu.Layout.TCGEN05_TMEM_NATIVE)
        value = plgpu.layout_cast(loaded, blocks.by_line()) * given.factor
        if given.bias_G is None:
            return value
        width = given.bias_G.shape[0] // 2
        columns = pl.ds(box * width + tile.column * TILE_F + chunk * CHUNK, CHUNK)
        bias_W = plgpu.load(
            given.bias_G.at[columns], layout=blocks.by_line().reduce(0), optimized=False
        )
        bias_LW = lax.broadcast_in_dim(bias_W.astype(jnp.float32), value.shape, (1,))
        return value + plgpu.layout_cast(bias_LW, blocks.by_line())

    gate, up = activation.clamped(load(0), load(1))
    inside = gate if activation.alpha == 1 else gate * jnp.float32(activation.alpha)
    sigmoid = jnp.float32(1) / (jnp.float32(1) + jnp.exp(-inside))
    act = gate * sigmoid * activation.shifted(up)
    return act if given.weight is None else act * given.weight


def store_act(
    tile: main_loop.Tile, acc, release, inputs, outputs, scratch, *, given, activation
) -> None:
    """Stores the expert's rows of act, (T, F / CHUNK, CHUNK), in columns of 128 bytes, from two buffers in turn."""
    given = _given(tile, inputs, given)
    out = scratch["out"]
    chunks = out.shape[2]
    for chunk in range(TILE_F // CHUNK):
        act = _act(tile, acc, chunk, given, activation)
        if chunk == TILE_F // CHUNK - 1:
            release()
        turn, part = divmod(chunk, chunks)
        buffer = out.at[turn % 2]
        if not part:
            # The copies that read this buffer two turns ago.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        plgpu.store(buffer.at[:, part], act.astype(out.dtype), optimized=False)
        if part == chunks - 1:
            plgpu.commit_smem()
            columns = pl.ds(tile.column * (TILE_F // CHUNK) + turn * chunks, chunks)
            to = tile.block * TILE_M + tile.first_row
            row_copies.store_rows(buffer, outputs[0], tile.first_row, to, tile.rows, columns)


def store_codes(
    tile: main_loop.Tile, acc, release, inputs, outputs, scratch, *, given, activation, format, rule
) -> None:
    """Quantizes a tile, and stores the expert's rows of codes and a whole tile of scales."""
    given, nvfp4 = _given(tile, inputs, given), None
    if FORMATS[format].scale == "e4m3":
        amax_L = jnp.full((TILE_M,), inputs[-1][tile.expert])
        nvfp4 = blocks.nvfp4_factors(plgpu.layout_cast(amax_L, blocks.per_line()))
    chunks = TILE_F // CHUNK
    # Row first_row lies in row 128 of the buffer, so that copies begin at multiples of 128 bytes.
    lines = pl.ds(TILE_M - tile.first_row, TILE_M)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    word_L, done = None, 0
    for chunk in range(chunks):
        act = _act(tile, acc, chunk, given, activation)
        if chunk == chunks - 1:
            release()
        codes, bytes_L = _quantize(act, format, rule, nvfp4)
        columns = pl.ds(chunk * CHUNK, CHUNK)
        plgpu.store(scratch["codes"].at[lines, columns], codes, optimized=False)
        for byte_L in bytes_L:
            word_L = byte_L if done % 4 == 0 else word_L | byte_L << 8 * (done % 4)
            done += 1
            if done % 4 == 0:
                plgpu.store(scratch["words"].at[done // 4 - 1], word_L, optimized=False)
    plgpu.commit_smem()
    _arrange(scratch["words"], scratch["atoms"])
    plgpu.commit_smem()
    words = scratch["atoms"].shape[0]
    plgpu.copy_smem_to_gmem(
        scratch["atoms"],
        outputs[1].at[tile.index, pl.ds(tile.column * words, words)],
        commit_group=False,
    )
    columns = pl.ds(tile.column * TILE_F, TILE_F)
    begin = scratch["codes"].at[pl.ds(TILE_M, TILE_M)]
    to = tile.block * TILE_M + tile.first_row
    row_copies.store_rows(begin, outputs[0], 0, to, tile.rows, columns)


def _quantize(act_LW: jax.Array, format: str, rule: str, nvfp4) -> tuple[jax.Array, list]:
    """Returns codes of a chunk, float4_e2m1fn [L, W], and the scale byte of each of its blocks, int32 [L]."""
    values, found = [], []
    for first in range(0, CHUNK, FORMATS[format].block):
        x_LB = act_LW[:, first : first + FORMATS[format].block]
        largest_L = blocks.largest(x_LB)
        x_LB = blocks.cleared(x_LB, blocks.is_finite(largest_L))
        if nvfp4 is not None:
            byte_L, factor_L = blocks.nvfp4_scale(largest_L, *nvfp4)
        else:
            byte_L, exponent_L = blocks.mxfp4_scale(largest_L, rule)
            factor_L = elements.power_of_two(-exponent_L)
        values.append(blocks.scaled(x_LB, factor_L))
        found.append(byte_L)
    codes = jnp.concatenate(values, axis=1) if len(values) > 1 else values[0]
    return codes.astype(jnp.float4_e2m1fn), found


def _arrange(words, atoms) -> None:
    """Arranges words of 128 lines, (words, L), as tensor cores read them: (words, 32, 4)."""
    quarter = plgpu.Layout.TILED(
        plgpu.Tiling(((32,), (1,))),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    for word in range(words.shape[0]):
        for q in range(4):
            word_Q = plgpu.layout_cast(words[word, pl.ds(q * 32, 32)], quarter)
            plgpu.store(atoms.at[word, :, q], word_Q, optimized=False)


def zero_the_rest(share, shares, inputs, outputs, scratch) -> None:
    """Writes zeros into the rows beyond the groups, blocks of 128 rows in turn."""
    used, out = inputs[0][0], outputs[0]
    num_rows, num_columns, *_ = out.shape
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if "out" in scratch:
        buffer = scratch["out"].at[0]
        parts = [buffer.at[:, part] for part in range(buffer.shape[1])]
    else:
        buffer = scratch["codes"].at[pl.ds(0, TILE_M)]
        parts = [buffer]
    width = buffer.shape[1]
    for part in parts:
        zero = plgpu.layout_cast(jnp.zeros(part.shape, jnp.float32), blocks.by_line())
        plgpu.store(part, zero.astype(out.dtype), optimized=False)
    plgpu.commit_smem()

    def zero_block(i, _):
        to = used + (share + i * shares) * TILE_M
        rows = jnp.minimum(num_rows - to, TILE_M)

        def zero_columns(j, _):
            row_copies.store_rows(buffer, out, 0, to, rows, pl.ds(j * width, width))

        lax.fori_loop(0, num_columns // width, zero_columns, None)

    left = lax.div(num_rows - used + TILE_M - 1, jnp.int32(TILE_M))
    lax.fori_loop(0, lax.div(jnp.maximum(left - share, 0) + shares - 1, shares), zero_block, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
