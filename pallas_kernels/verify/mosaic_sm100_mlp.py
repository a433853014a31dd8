"""Cases of the fused feed-forward on data-centre Blackwell: gate, up and SwiGLU, as numbers or as codes."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels.aot import Target
from pallas_kernels.formats import FORMATS
from pallas_kernels.grouped_matmul.activation import GPT_OSS, SWIGLU, SwiGLU
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Family, Program, capability
from pallas_kernels.verify.mosaic_sm100 import TEMP_BYTES, loop_expectations
from pallas_kernels.verify.shapes import EXPERTS, HIDDEN, ROWS, WIDTH, array, packed

# As most tiles of 128 rows as 128 experts can need, each with its own tiles of scales: 128 rows of words.
_TILES = ROWS // 128 + EXPERTS - 1


def _operands(format: str) -> tuple:
    return (
        packed((ROWS, WIDTH), format),
        packed((EXPERTS, 2 * HIDDEN, WIDTH), format),
        array(EXPERTS, dtype=jnp.int32),
        array(EXPERTS),
        array(ROWS) if FORMATS[format].scale == "e4m3" else None,
    )


def _build(
    target: Target, *, format: str, out_dtype: jnp.dtype | None, activation: SwiGLU
) -> Program:
    """To numbers of a dtype, or to codes where it is None; with a bias but for plain SwiGLU."""
    from pallas_kernels.grouped_matmul import mosaic_sm100_mlp as mlp

    def fn(x, gate_up, group_sizes_E, expert_scale_E, row_scale_T, act_amax_E, bias_EG):
        options = {
            "bias_EG": bias_EG,
            "activation": activation,
            "expert_scale_E": expert_scale_E,
            "row_scale_T": row_scale_T,
            "tiling": mlp.default_tiling(format),
            "num_sms": target.num_sms,
        }
        operands = x, gate_up, group_sizes_E
        if out_dtype is not None:
            return mlp.gate_up_swiglu_codes(*operands, out_dtype=out_dtype, **options)
        return mlp.gate_up_swiglu_quantized(
            *operands, format=format, act_amax_E=act_amax_E, **options
        )

    calibrated = out_dtype is None and FORMATS[format].scale == "e4m3"
    bias = None if activation == SWIGLU else array(EXPERTS, 2 * HIDDEN, dtype=jnp.bfloat16)
    return fn, (*_operands(format), array(EXPERTS) if calibrated else None, bias)


def _case(name: str, format: str, out_dtype: jnp.dtype | None, activation: SwiGLU = SWIGLU) -> Case:
    from pallas_kernels.grouped_matmul import mosaic_sm100_mlp as mlp

    tiling, temp = mlp.default_tiling(format), TEMP_BYTES
    if out_dtype is None:
        temp += _TILES * 128 * HIDDEN // FORMATS[format].block
    return Case(
        name=name,
        format=format,
        runs_on=capability(10),
        build=functools.partial(_build, format=format, out_dtype=out_dtype, activation=activation),
        expectations=(
            *loop_expectations(format, tiling, boxes=2),
            expect.memories(
                shared_at_most=tiling.smem_bytes(format, jnp.float32),
                tmem_columns=tiling.tmem_columns(format),
            ),
            expect.instructions(r"MUFU\.EX2"),
            expect.temp_at_most(temp),
        ),
    )


FAMILY = Family(
    name="mosaic_sm100_mlp",
    about="W4A4 gate, up, SwiGLU and requantization in one kernel",
    interpreted="codes bit-equal to the formats' own; races, mutants",
    cases=tuple(
        case
        for format in ("nvfp4", "mxfp4")
        for case in (
            _case("to bfloat16", format, jnp.dtype(jnp.bfloat16)),
            _case("to codes", format, None),
            _case("to bfloat16, gpt-oss", format, jnp.dtype(jnp.bfloat16), GPT_OSS),
            _case("to codes, gpt-oss", format, None, GPT_OSS),
        )
    ),
)
