"""Cases of the grouped matmul of few rows on data-centre Blackwell, whose operands are swapped."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels.aot import Target
from pallas_kernels.grouped_matmul import mosaic_sm100_decode as decode
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Family, Program, capability
from pallas_kernels.verify.mosaic_sm100 import INPUTS, OUTPUTS, loop_expectations
from pallas_kernels.verify.shapes import EXPERTS, array, packed

ROWS = 16  # two tokens, eight experts each
# The schedule of tiles, and a tile of scales for each block of rows.
TEMP_BYTES = 64 * 1024


def _build(
    target: Target, *, format: str, tile_t: int, out_dtype: jnp.dtype, scaled: bool
) -> Program:
    def fn(x, w, group_sizes_E, expert_scale_E, row_scale_T, bias_EN):
        return decode.grouped_matmul_codes(
            x,
            w,
            group_sizes_E,
            expert_scale_E=expert_scale_E,
            row_scale_T=row_scale_T,
            bias_EN=bias_EN,
            out_dtype=out_dtype,
            tiling=decode.default_tiling(tile_t, format, out_dtype),
            num_sms=target.num_sms,
        )

    rows = max(ROWS, tile_t)
    return fn, (
        packed((rows, INPUTS), format, "linear"),
        packed((EXPERTS, OUTPUTS, INPUTS), format),
        array(EXPERTS, dtype=jnp.int32),
        array(EXPERTS),
        array(rows) if scaled else None,
        array(EXPERTS, OUTPUTS) if scaled else None,
    )


def _case(
    format: str, tile_t: int, *, out_dtype: jnp.dtype = jnp.bfloat16, scaled: bool = False
) -> Case:
    tiling = decode.default_tiling(tile_t, format, out_dtype)
    name = f"{tile_t}x128" + (", float32 out, row scales, bias" if scaled else "")
    return Case(
        name=name,
        each_gpu=name == "8x128",
        format=format,
        runs_on=capability(10),
        build=functools.partial(
            _build, format=format, tile_t=tile_t, out_dtype=jnp.dtype(out_dtype), scaled=scaled
        ),
        expectations=(
            # XLA makes tiles from the scales of the rows, one for each block.
            *loop_expectations(
                format,
                tiling,
                packed_as_they_are=("args[0].codes", "args[1].codes", "args[1].scales"),
            ),
            expect.memories(
                shared_at_most=tiling.smem_bytes(format, out_dtype),
                tmem_columns=tiling.tmem_columns(format),
            ),
            expect.temp_at_most(TEMP_BYTES),
        ),
    )


FAMILY = Family(
    name="mosaic_sm100_decode",
    about="W4A4 grouped matmul of few rows, operands swapped",
    interpreted="numerics, races and mutants",
    cases=tuple(
        case
        for format in ("nvfp4", "mxfp4")
        for case in (
            *(_case(format, tile_t) for tile_t in (8, 16, 32, 64)),
            _case(format, 8, out_dtype=jnp.float32, scaled=True),
        )
    ),
)
