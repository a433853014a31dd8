"""Cases of the quantize kernel on data-centre Blackwell."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels.aot import Target
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Family, Program, capability
from pallas_kernels.verify.shapes import ROWS, WIDTH, array

TOKENS = 512
# What is asked for beside the format.
OPTIONS: dict[str, dict] = {
    "rows gathered": {"gathers": True},
    "Hadamard, rounded stochastically": {"hadamard": 16, "draws": True},
    "static scale": {"given": True},
}


def _build(
    target: Target, *, format: str, gathers=False, hadamard=None, draws=False, given=False
) -> Program:
    from pallas_kernels import formats
    from pallas_kernels.quantize import mosaic_sm100

    rows = ROWS if gathers else TOKENS

    def fn(x_TK, token_N, amax_N, key):
        return mosaic_sm100.quantize_rows(
            x_TK,
            format,
            rule=formats.FORMATS[format].rules[0],
            token_N=token_N,
            amax_N=amax_N,
            hadamard=hadamard,
            key=key,
            num_sms=target.num_sms,
        )

    return fn, (
        array(TOKENS, WIDTH, dtype=jnp.bfloat16),
        array(ROWS, dtype=jnp.int32) if gathers else None,
        array(rows) if given else None,
        array(2, dtype=jnp.uint32) if draws else None,
    )


def _case(name: str, format: str, **options: object) -> Case:
    # Random bits are drawn by XLA, four bytes an element, of which two are kept.
    temp = 6 * TOKENS * WIDTH if options.get("draws") else 0
    return Case(
        name=name,
        format=format,
        runs_on=capability(10),
        build=functools.partial(_build, format=format, **options),
        expectations=(
            expect.num_kernels(1),
            expect.no_mma(),
            expect.no_spills,
            expect.within_limits,
            expect.temp_at_most(temp + 4096),
        ),
    )


FAMILY = Family(
    name="quantize_sm100",
    about="rows to packed FP4 and tensor-core scales in one pass",
    interpreted="bit-equal to the formats' own; races, mutants",
    cases=tuple(
        _case(name, format, **options)
        for format in ("nvfp4", "mxfp4")
        for name, options in OPTIONS.items()
        if format == "nvfp4" or "given" not in options  # MXFP4 has no scale of a row
    ),
)
