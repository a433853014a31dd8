"""The threads' side of the quantize kernel: copies, and who quantizes which line. Its arithmetic is in `blocks`.

T tokens, N rows of the output, C lines of a row, L 128 lines of a step, B elements of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import elements
from pallas_kernels.quantize import blocks
from pallas_kernels.quantize.blocks import LINES
from pallas_kernels.quantize.tiling import Plan

_WARP = 32
_MOST_BOX = 256  # elements of a copy's box along an axis


@dataclasses.dataclass(frozen=True)
class Refs:
    """References of the kernel: `_g` in global, `_s` in shared memory; None where the plan needs none.

    Attributes:
      x_g: (T, C, pieces, piece). token_g: (N,) int32. amax_g: (N,) float32, given or found. random_g: as x_g, uint16 of
        N rows.
      codes_g: (N, C, line) E2M1. scales_g: (tiles, C, 32, 4) int32, a word for each line.
      x_s, random_s: (slots, pieces, L, piece). codes_s: (2, L, line). lines_s: (L,) int32.
      words_s: (steps, L), words as threads hold them. atoms_s: (steps * lanes, rows per quarter, 4), as memory does.
      full: a barrier for each slot.
    """

    x_g: Any
    codes_g: Any
    scales_g: Any
    token_g: Any = None
    amax_g: Any = None
    random_g: Any = None
    x_s: Any = None
    random_s: Any = None
    codes_s: Any = None
    words_s: Any = None
    atoms_s: Any = None
    lines_s: Any = None
    full: Any = None


def scratch(plan: Plan) -> dict:
    """Shared memory of a block of threads, by the names of `Refs`."""

    def swizzled(dtype: jnp.dtype):
        swizzle = plgpu.SwizzleTransform(plan.piece * jnp.dtype(dtype).itemsize)
        shape = (plan.tiling.slots, plan.pieces, LINES, plan.piece)
        return plgpu.SMEM(shape, dtype, transforms=(swizzle,))

    found = {
        "x_s": swizzled(plan.dtype),
        "codes_s": plgpu.SMEM((2, LINES, plan.line), jnp.float4_e2m1fn),
        "words_s": plgpu.SMEM((plan.steps, LINES), jnp.int32),
        "atoms_s": plgpu.SMEM(
            (plan.steps * plan.tiling.lanes, plan.rows_per_quarter, 4), jnp.int32
        ),
        "full": plgpu.Barrier(
            num_arrivals=plan.rows * plan.pieces * (1 + plan.draws),
            num_barriers=plan.tiling.slots,
        ),
    }
    if plan.finds_amax:
        found["lines_s"] = plgpu.SMEM((LINES,), jnp.int32)
    if plan.draws:
        found["random_s"] = swizzled(jnp.uint16)
    return found


def run(refs: Refs, plan: Plan, ctas: int) -> None:
    """Quantizes the groups cta, cta + ctas, ..."""
    cta = lax.axis_index("cta")
    groups = lax.div(plan.groups - 1 - cta, ctas) + 1
    loads = groups * plan.steps
    slots = plan.tiling.slots

    def load(warp, i):
        group = cta + lax.div(i, plan.steps) * ctas
        _load(refs, plan, warp, group, lax.rem(i, plan.steps), lax.rem(i, slots))

    @plgpu.warp_map
    def _(warp):
        lax.fori_loop(0, jnp.minimum(slots, loads), lambda i, _: load(warp, i), None)

    def quantize_group(index, _):
        group, first = cta + index * ctas, index * plan.steps
        factors = _global_factors(refs, plan, group, first)

        def quantize_step(step, _):
            i = first + step
            slot, buffer = lax.rem(i, slots), lax.rem(i, 2)
            if not plan.finds_amax:
                plgpu.barrier_wait(refs.full.at[slot])
            refs.words_s[step] = _quantize_line(refs, plan, slot, buffer, factors)
            # Copies see the codes that were written, and may write to the slot that was read.
            plgpu.commit_smem()

            @plgpu.warp_map
            def _(warp):
                @pl.when(i + slots < loads)
                def _():
                    load(warp, i + slots)

                # The codes of the step before have left their buffer, the one that the next step writes to.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                _store_codes(refs, plan, warp, group, step, buffer)

        lax.fori_loop(0, plan.steps, quantize_step, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _arrange_scales(refs, plan)
        _store_scales(refs, plan, group)

    lax.fori_loop(0, groups, quantize_group, None)
    _clear_padding(refs, plan, cta, ctas)
    plgpu.wait_smem_to_gmem(0)
    plgpu.warp_map(lambda warp: plgpu.wait_smem_to_gmem(0))


def _load(refs: Refs, plan: Plan, warp, group, step, slot) -> None:
    """Begins to load a step's lines of a warp's rows; zeros where there are none."""
    lanes = plan.tiling.lanes
    line, full = pl.ds(step * lanes, lanes), refs.full.at[slot]
    for within in range(plan.rows_per_quarter):
        place = warp * plan.rows_per_quarter + within
        row = plan.row(group, place)
        source = row
        if plan.gathers:
            token = refs.token_g[jnp.minimum(row, plan.num_rows - 1)]
            source = jnp.where(row < plan.num_rows, token, jnp.int32(plan.num_tokens))
        here = pl.ds(place * lanes, lanes)
        for piece in range(plan.pieces):
            to = (slot, piece, here)
            plgpu.copy_gmem_to_smem(refs.x_g.at[source, line, piece], refs.x_s.at[to], full)
            if plan.draws:
                random_g = refs.random_g.at[row, line, piece]
                plgpu.copy_gmem_to_smem(random_g, refs.random_s.at[to], full)


def _global_factors(refs: Refs, plan: Plan, group, first) -> tuple | None:
    """Returns what `blocks.nvfp4_factors` makes of each line's global amax, found or given."""
    if not plan.has_global:
        return None
    if plan.finds_amax:
        amax = _row_maxima(refs, plan, first)
    rows = [plan.row(group, place) for place in range(plan.rows)]
    if not plan.finds_amax:
        amax = [refs.amax_g[jnp.minimum(row, plan.num_rows - 1)] for row in rows]
    place_L = lax.div(
        plgpu.broadcasted_iota(jnp.int32, (LINES,), 0, layout=blocks.per_line()),
        jnp.int32(plan.tiling.lanes),
    )
    amax_L = jnp.full((LINES,), amax[0])
    for place in range(1, plan.rows):
        amax_L = jnp.where(place_L == place, amax[place], amax_L)
    if plan.finds_amax:
        for place, row in enumerate(rows):

            @pl.when(row < plan.num_rows)
            def _(place=place, row=row):
                refs.amax_g[row] = amax[place]

    return blocks.nvfp4_factors(amax_L)


def _row_maxima(refs: Refs, plan: Plan, first) -> list[jax.Array]:
    """Waits for a group's lines and returns each row's largest finite block maximum, float32 scalars."""

    def largest(step, largest_L):
        slot = lax.rem(first + step, plan.tiling.slots)
        plgpu.barrier_wait(refs.full.at[slot])
        for _, x_LB, _ in _blocks_of(refs, plan, slot):
            amax_L = blocks.amax(blocks.largest(x_LB))
            largest_L = jnp.maximum(largest_L, lax.bitcast_convert_type(amax_L, jnp.int32))
        return largest_L

    # As integers, whose order is that of magnitudes, subnormal ones included.
    zero_L = plgpu.layout_cast(jnp.zeros((LINES,), jnp.int32), blocks.per_line())
    refs.lines_s[...] = lax.fori_loop(0, plan.steps, largest, zero_L)
    found = [jnp.max(_lines_of(refs.lines_s, plan, place), axis=0) for place in range(plan.rows)]
    return [lax.bitcast_convert_type(bits, jnp.float32) for bits in found]


def _quantize_line(refs: Refs, plan: Plan, slot, buffer, factors) -> jax.Array:
    """Quantizes a step: codes to a buffer; returns each line's four scale bytes as a word, int32 [L]."""
    word_L = None
    values, done = [], 0
    for i, x_LB, random_LB in _blocks_of(refs, plan, slot):
        largest_L = blocks.largest(x_LB)
        x_LB = blocks.cleared(x_LB, blocks.is_finite(largest_L))
        exponent_L = None
        if plan.has_global:
            byte_L, factor_L = blocks.nvfp4_scale(largest_L, *factors)
        else:
            byte_L, exponent_L = blocks.mxfp4_scale(largest_L, plan.rule)
            factor_L = elements.power_of_two(-exponent_L)
        if not plan.draws:
            values.append(blocks.scaled(x_LB, factor_L))
        elif plan.has_global:
            values.append(blocks.drawn(blocks.scaled(x_LB, factor_L), None, random_LB))
        else:
            values.append(blocks.drawn(x_LB.astype(jnp.float32), exponent_L, random_LB))
        word_L = byte_L if word_L is None else word_L | byte_L << 8 * i
        if (i + 1) * plan.block % plan.piece == 0:
            codes = jnp.concatenate(values, axis=1).astype(jnp.float4_e2m1fn)
            columns = pl.ds(done, plan.piece)
            plgpu.store(refs.codes_s.at[buffer, :, columns], codes, optimized=False)
            values, done = [], done + plan.piece
    return word_L


def _blocks_of(refs: Refs, plan: Plan, slot):
    """Yields the four blocks of each line in a slot: (number, x [L, B], random int32 [L, B] or None)."""
    vector = 16 // plan.dtype.itemsize
    number = 0
    for piece in range(plan.pieces):
        x = plgpu.layout_cast(refs.x_s[slot, piece], blocks.by_line(vector))
        x = blocks.hadamard(x) if plan.hadamard else plgpu.layout_cast(x, blocks.by_line())
        random = None
        if plan.draws:
            random = plgpu.layout_cast(refs.random_s[slot, piece], blocks.by_line())
            random = random.astype(jnp.int32)
        for start in range(0, plan.piece, plan.block):
            part = slice(start, start + plan.block)
            yield number, x[:, part], None if random is None else random[:, part]
            number += 1


def _store_codes(refs: Refs, plan: Plan, warp, group, step, buffer) -> None:
    """Begins to store a step's codes of a warp's rows."""
    lanes = plan.tiling.lanes

    def store(lines):
        for within in range(plan.rows_per_quarter):
            place = warp * plan.rows_per_quarter + within
            row = plan.row(group, place)

            @pl.when(row < plan.num_rows)
            def _(place=place, row=row):
                plgpu.copy_smem_to_gmem(
                    refs.codes_s.at[buffer, pl.ds(place * lanes, lines)],
                    refs.codes_g.at[row, pl.ds(step * lanes, lines)],
                )

    # A copy of contiguous memory is not cut off at the end of a row: a shorter last step has copies of its own.
    if plan.last_lanes == lanes:
        store(lanes)
        return
    pl.when(step < plan.steps - 1)(functools.partial(store, lanes))
    pl.when(step == plan.steps - 1)(functools.partial(store, plan.last_lanes))


def _arrange_scales(refs: Refs, plan: Plan) -> None:
    """Arranges a group's words as tensor cores read them."""
    lanes = plan.tiling.lanes
    for step in range(plan.steps):
        for place in range(plan.rows):
            quarter, within = divmod(place, plan.rows_per_quarter)
            words = _lines_of(refs.words_s.at[step], plan, place)
            here = pl.ds(step * lanes, lanes)
            plgpu.store(refs.atoms_s.at[here, within, quarter], words, optimized=False)
    plgpu.commit_smem()


def _store_scales(refs: Refs, plan: Plan, group) -> None:
    """Begins to store a group's arranged words."""
    lanes, parts = plan.tiling.lanes, plan.rows_per_quarter
    tile, part = lax.div(group, lanes), lax.rem(group, lanes)
    for first in range(0, plan.lines, _MOST_BOX):
        some = pl.ds(first, min(_MOST_BOX, plan.lines - first))
        plgpu.copy_smem_to_gmem(
            refs.atoms_s.at[some], refs.scales_g.at[tile, some, pl.ds(part * parts, parts)]
        )


def _clear_padding(refs: Refs, plan: Plan, cta, ctas: int) -> None:
    """Stores zeros for the groups that only pad the last tile of scales."""
    empty = plan.all_groups - plan.groups
    mine = lax.div(empty - 1 - cta + ctas, ctas)  # none for a CTA beyond the last

    @pl.when(mine > 0)
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.atoms_s[...] = jnp.zeros(refs.atoms_s.shape, jnp.int32)
        plgpu.commit_smem()

        def clear(index, _):
            _store_scales(refs, plan, plan.groups + cta + index * ctas)

        lax.fori_loop(0, mine, clear, None)


def _lines_of(ref, plan: Plan, place: int) -> jax.Array:
    """Loads the elements of one row's lines from [L] in shared memory, into every warp."""
    lanes = plan.tiling.lanes
    spare = () if lanes == _WARP else (plgpu.Replicated(_WARP // lanes),)
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((lanes,), (1,))),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=(*spare, -2),
        vector_dim=-1,
    )
    return plgpu.layout_cast(ref[pl.ds(place * lanes, lanes)], layout)
