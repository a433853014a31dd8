"""Cases of the weight-only grouped matmul on Hopper."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels.aot import Target
from pallas_kernels.grouped_matmul.mosaic_sm90_tiling import default_tiling
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Family, Program, capability
from pallas_kernels.verify.shapes import EXPERTS, HIDDEN, WIDTH, array, packed

OUTPUTS, INPUTS = 2 * HIDDEN, WIDTH
K_PER_MMA = 16
# Tokens times experts per token: so many rows of each expert.
ROWS = {"decode": 4, "few rows": 32, "prefill": 128}


def _build(target: Target, *, format: str, rows: int) -> Program:
    from pallas_kernels import formats
    from pallas_kernels.grouped_matmul import mosaic_sm90

    num_rows = EXPERTS * rows

    def fn(x, w, scale_EBN, sizes_E, row_scale_T):
        return mosaic_sm90.grouped_matmul_codes(
            x,
            w,
            sizes_E,
            scale_EBN=scale_EBN,
            row_scale_T=row_scale_T,
            num_sms=target.num_sms,
        )

    blocks = INPUTS // formats.FORMATS[format].block
    return fn, (
        array(num_rows, INPUTS, dtype=jnp.bfloat16),
        packed((EXPERTS, OUTPUTS, INPUTS), format, "linear"),
        array(EXPERTS, blocks, OUTPUTS, dtype=jnp.uint8),
        array(EXPERTS, dtype=jnp.int32),
        array(num_rows),
    )


def _case(name: str, format: str) -> Case:
    rows = ROWS[name]
    tiling = default_tiling(rows, OUTPUTS, INPUTS, format, jnp.bfloat16)
    # In bfloat16: rows in the order that the kernel reads, groups aligned to 8; results before the tail is cleared.
    passes = 2 * EXPERTS * ((rows + 8) * INPUTS + rows * OUTPUTS)
    return Case(
        name=name,
        format=format,
        runs_on=capability(9),
        build=functools.partial(_build, format=format, rows=rows),
        expectations=(
            expect.num_kernels(1),
            expect.mma(
                rf"wgmma\.mma_async.*m64n{tiling.tile_n}k16\.f32\.bf16\.bf16",
                rf"HGMMA\.64x{tiling.tile_n}x16\.F32\.BF16",
                count=tiling.tile_k // K_PER_MMA,
            ),
            expect.tma_loads(3),
            expect.no_spills,
            expect.within_limits,
            expect.memories(shared_at_most=tiling.smem_bytes(format, jnp.bfloat16)),
            # The scales of w itself are not read: they come with the weight's rows innermost.
            expect.packed_as_they_are("args[1].codes", "args[2]"),
            expect.temp_at_most(passes + 64 * 1024),
        ),
        each_gpu=name == "prefill",
    )


FAMILY = Family(
    name="mosaic_sm90",
    about="weight-only grouped matmul, wgmma",
    interpreted="numerics, races, mutants",
    cases=tuple(_case(name, format) for format in ("nvfp4", "mxfp4") for name in ROWS),
)
