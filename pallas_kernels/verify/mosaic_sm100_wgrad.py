"""Cases of the weight gradient with FP4 operands on data-centre Blackwell."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels.aot import Target
from pallas_kernels.grouped_matmul.mosaic_sm100_tiling import Tiling
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Family, Program, capability
from pallas_kernels.verify.mosaic_sm100 import TEMP_BYTES, loop_expectations
from pallas_kernels.verify.shapes import EXPERTS, HIDDEN, ROWS, WIDTH, array, packed

UNIT = 256  # tokens
UNITS = ROWS // UNIT + EXPERTS
_tiling = functools.partial(Tiling, group_order=8)
WIDE = _tiling(tile_n=256, stages=3, accumulators=1)


def _build(target: Target, *, format: str, tiling: Tiling, out_dtype: jnp.dtype) -> Program:
    from pallas_kernels.grouped_matmul import mosaic_sm100_wgrad

    def fn(dy, x, sizes_E, expert_scale_E):
        return mosaic_sm100_wgrad.weight_gradient_codes(
            dy,
            x,
            sizes_E,
            expert_scale_E=expert_scale_E,
            out_dtype=out_dtype,
            tiling=tiling,
            num_sms=target.num_sms,
        )

    return fn, (
        packed((UNITS, 2 * HIDDEN, UNIT), format),
        packed((UNITS, WIDTH, UNIT), format),
        array(EXPERTS, dtype=jnp.int32),
        array(EXPERTS),
    )


def _case(name: str, format: str, tiling: Tiling, out_dtype: jnp.dtype) -> Case:
    return Case(
        name=name,
        format=format,
        runs_on=capability(10),
        build=functools.partial(_build, format=format, tiling=tiling, out_dtype=out_dtype),
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
    name="mosaic_sm100_wgrad",
    about="weight gradient of W4A4, tcgen05 block-scaled MMA",
    interpreted="numerics, races, mutants",
    cases=(
        *(
            case
            for format in ("nvfp4", "mxfp4")
            for case in (
                _case("128x128, float32", format, _tiling(epilogue_n=32), jnp.float32),
                _case("128x128, bfloat16", format, _tiling(epilogue_n=64), jnp.bfloat16),
            )
        ),
        _case("128x256, float32", "nvfp4", WIDE, jnp.float32),
    ),
)
