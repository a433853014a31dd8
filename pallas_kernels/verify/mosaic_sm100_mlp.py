"""Cases of the fused feed-forward of experts on data-centre Blackwell."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels.aot import Target
from pallas_kernels.grouped_matmul.mosaic_sm100_tiling import Tiling
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Family, Program, capability
from pallas_kernels.verify.mosaic_sm100 import TEMP_BYTES, main_loop
from pallas_kernels.verify.shapes import EXPERTS, ROWS, WIDTH, array, packed

HIDDEN = 2048  # wide enough for the steps of down to be a loop: LLVM unrolls three of them
# Of the fused kernel, as far as counts depend on it; the number of stages is the kernel's own choice.
TILING = Tiling(tile_n=256, accumulators=1)


def _build(target: Target, *, format: str, out: str) -> Program:
    from pallas_kernels.grouped_matmul import mosaic_sm100_mlp

    tiling = mosaic_sm100_mlp.default_tiling(format)
    options = {"tiling": tiling, "num_sms": target.num_sms}
    calibrated = array(EXPERTS) if format == "nvfp4" and out != "bfloat16" else None

    def fn(x, gate_up, down, sizes_E, scale_E, row_T, act_amax_E):
        shared = (x, gate_up, sizes_E)
        if out == "bfloat16":
            return mosaic_sm100_mlp.gate_up_swiglu_codes(
                *shared,
                expert_scale_E=scale_E,
                row_scale_T=row_T,
                out_dtype=jnp.dtype(jnp.bfloat16),
                **options,
            )
        if out == format:
            return mosaic_sm100_mlp.gate_up_swiglu_quantized(
                *shared,
                expert_scale_E=scale_E,
                row_scale_T=row_T,
                format=format,
                act_amax_E=act_amax_E,
                **options,
            )
        return mosaic_sm100_mlp.expert_mlp_codes(
            x,
            gate_up,
            down,
            sizes_E,
            gate_up_scale_E=scale_E,
            down_scale_E=scale_E,
            row_scale_T=row_T,
            row_weight_T=row_T,
            act_amax_E=act_amax_E,
            out_dtype=jnp.dtype(jnp.bfloat16),
            **options | {"tiling": (tiling, Tiling())},
        )

    whole = out == "layer"
    return fn, (
        packed((ROWS, WIDTH), format),
        packed((EXPERTS, 2 * HIDDEN, WIDTH), format),
        packed((EXPERTS, WIDTH, HIDDEN), format) if whole else None,
        array(EXPERTS, dtype=jnp.int32),
        array(EXPERTS),
        array(ROWS),
        calibrated,
    )


def _case(name: str, format: str, out: str, temp_bytes: int) -> Case:
    fused = main_loop(format, TILING, boxes=2, kernel="gate_up_swiglu")
    down = main_loop(format, Tiling(), kernel="grouped_matmul") if out == "layer" else ()
    return Case(
        name=name,
        format=format,
        runs_on=capability(10),
        build=functools.partial(_build, format=format, out=out),
        expectations=(
            *fused,
            *down,
            expect.num_kernels(2 if out == "layer" else 1),
            expect.no_spills,
            expect.within_limits,
            expect.packed_as_they_are(),
            expect.temp_at_most(temp_bytes),
        ),
        each_gpu=out == "layer",
    )


def _cases(format: str) -> tuple[Case, ...]:
    tiles = ROWS // 128 + EXPERTS
    # Scales come in tiles of 128 rows for each tile of rows, and are gathered to one for each block.
    scales = tiles * 128 * HIDDEN // 16
    # The layer between: codes, and scales as they come and as they are read.
    between = ROWS * HIDDEN // 2 + 2 * scales
    return (
        _case("SwiGLU, bfloat16 out", format, "bfloat16", TEMP_BYTES),
        _case("SwiGLU, 4 bits out", format, format, scales + TEMP_BYTES),
        _case("SwiGLU in 4 bits, down", format, "layer", between + TEMP_BYTES),
    )


FAMILY = Family(
    name="mosaic_sm100_mlp",
    about="gate, up and SwiGLU in one kernel, quantized on the way out",
    interpreted="numerics, races, mutants",
    cases=(*_cases("nvfp4"), *_cases("mxfp4")),
)
