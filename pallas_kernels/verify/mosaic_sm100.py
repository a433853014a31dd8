"""Cases of the W4A4 grouped matmul on data-centre Blackwell: gate and up projections in one."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels.aot import Target
from pallas_kernels.grouped_matmul.mosaic_sm100_tiling import Tiling
from pallas_kernels.schedules import PLAIN, SM100
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Family, Program, capability
from pallas_kernels.verify.shapes import EXPERTS, HIDDEN, ROWS, WIDTH, array, packed

OUTPUTS, INPUTS = 2 * HIDDEN, WIDTH
K_PER_MMA = 64  # 4-bit elements of a row that one MMA contracts
# The schedule of tiles, and little else.
TEMP_BYTES = 64 * 1024


def loop_expectations(
    format: str, tiling: Any, *, boxes: int = 1, packed_as_they_are: tuple[str, ...] = ()
):
    """What a program that is one kernel with this main loop must look like, whatever its epilogue.

    MMAs, copies of scales and loads are those of one k-step, and there are none elsewhere.

    Args:
      format: of both operands.
      tiling: of the main loop.
      boxes: loads that a tile's weights take; codes and scales are loaded each for itself.
      packed_as_they_are: parameters that nothing but the kernel may read; none: all that are packed.
    """
    scales = (1 + -(-tiling.tile_n // 128)) * tiling.scale_columns(format) // 4
    return (
        expect.block_scaled_mma(format, tiling.tile_k // K_PER_MMA, ctas=tiling.num_ctas),
        expect.scale_copies(scales),
        expect.tma_loads(2 + 2 * boxes),
        expect.num_kernels(1),
        expect.no_spills,
        expect.within_limits,
        expect.packed_as_they_are(*packed_as_they_are),
    )


def _build(
    target: Target, *, format: str, tiling: Tiling, out_dtype: jnp.dtype, scaled: bool
) -> Program:
    from pallas_kernels.grouped_matmul import mosaic_sm100

    def fn(x, w, group_sizes_E, expert_scale_E, row_scale_T, bias_EN):
        return mosaic_sm100.grouped_matmul_codes(
            x,
            w,
            group_sizes_E,
            expert_scale_E=expert_scale_E,
            row_scale_T=row_scale_T,
            bias_EN=bias_EN,
            out_dtype=out_dtype,
            tiling=tiling,
            num_sms=target.num_sms,
        )

    return fn, (
        packed((ROWS, INPUTS), format),
        packed((EXPERTS, OUTPUTS, INPUTS), format),
        array(EXPERTS, dtype=jnp.int32),
        array(EXPERTS),
        array(ROWS) if scaled else None,
        array(EXPERTS, OUTPUTS) if scaled else None,
    )


def _case(name: str, format: str, tiling: Tiling, *, out_dtype=jnp.bfloat16, scaled=False) -> Case:
    tiling = tiling.storing(out_dtype)
    return Case(
        name=name,
        each_gpu=name == "128x128",
        format=format,
        runs_on=capability(10),
        build=functools.partial(
            _build, format=format, tiling=tiling, out_dtype=jnp.dtype(out_dtype), scaled=scaled
        ),
        expectations=(
            *loop_expectations(format, tiling),
            expect.memories(
                shared_at_most=tiling.smem_bytes(format, out_dtype),
                tmem_columns=tiling.tmem_columns(format),
            ),
            expect.temp_at_most(TEMP_BYTES),
        ),
    )


FAMILY = Family(
    name="mosaic_sm100",
    about="W4A4 grouped matmul, tcgen05 block-scaled MMA",
    interpreted="numerics, races and mutants, all but 2 CTAs",
    cases=tuple(
        case
        for format in ("nvfp4", "mxfp4")
        for case in (
            *(_case(name, format, tiling) for name, tiling in SM100.items()),
            _case(
                "128x128, float32 out, row scales, bias",
                format,
                PLAIN,
                out_dtype=jnp.float32,
                scaled=True,
            ),
        )
    ),
)
