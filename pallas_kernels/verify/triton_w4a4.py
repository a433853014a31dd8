"""Cases of the W4A4 grouped matmul in Triton on RTX Blackwell."""

from __future__ import annotations

import functools
import re

import jax.numpy as jnp

from pallas_kernels.aot import Compiled, Target
from pallas_kernels.formats import FORMATS
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Expectation, Family, Program, capability
from pallas_kernels.verify.shapes import EXPERTS, HIDDEN, WIDTH, array, packed

# Tokens times experts per token: so many rows of each expert.
ROWS = {"decode": 8, "few rows": 64, "prefill": 256}
# The schedule of tiles and the scales of rows and experts.
TEMP_BYTES = 512 * 1024


def _build(target: Target, *, format: str, rows: int) -> Program:
    from pallas_kernels.grouped_matmul import triton_w4a4

    num_rows = EXPERTS * rows

    def fn(x, w, sizes_E, row_scale_T):
        return triton_w4a4.grouped_matmul_codes(
            x,
            w,
            sizes_E,
            row_scale_T=row_scale_T,
            out_dtype=jnp.bfloat16,
            capability=target.capability,
        )

    return fn, (
        packed((num_rows, WIDTH), format, "linear"),
        packed((EXPERTS, 2 * HIDDEN, WIDTH), format, "linear"),
        array(EXPERTS, dtype=jnp.int32),
        array(num_rows),
    )


def _block_scaled(format: str, rows: int) -> Expectation:
    """As many FP4 MMAs with a scale per block as a step takes, and none of another kind: not those of decoded values.

    A scale per 16 is E4M3, one per 32 E8M0. In machine code OMMA.SF, with UE4M3.4X or E8.
    """
    vector, scale, sass = "2X", "ue8m0", "E8"
    if FORMATS[format].block == 16:
        vector, scale, sass = "4X", "ue4m3", "UE4M3.4X"
    kind = f"kind::mxf4nvf4.block_scale.scale_vec::{vector}.f32.e2m1.e2m1.f32.{scale}"

    def expectation(compiled: Compiled) -> list[str]:
        from pallas_kernels.grouped_matmul import triton_w4a4

        t = triton_w4a4.default_tiling(rows, 2 * HIDDEN, WIDTH, compiled.target.capability)
        check = expect.mma(
            re.escape(f"mma.sync.aligned.m16n8k64.row.col.{kind}"),
            re.escape(f"OMMA.SF.16864.F32.E2M1.E2M1.{sass}"),
            count=t.block_m * t.block_n * t.block_k // (16 * 8 * 64 * t.num_warps),
        )
        return check(compiled)

    return expectation


def _case(name: str, format: str) -> Case:
    return Case(
        name=name,
        format=format,
        runs_on=capability(12),
        build=functools.partial(_build, format=format, rows=ROWS[name]),
        expectations=(
            expect.num_kernels(1),
            _block_scaled(format, ROWS[name]),
            expect.no_spills,
            expect.within_limits,
            expect.packed_as_they_are(),
            expect.temp_at_most(TEMP_BYTES),
        ),
    )


FAMILY = Family(
    name="triton_w4a4",
    about="W4A4 grouped matmul, block-scaled mma.sync of RTX Blackwell",
    interpreted="numerics and mutants, in Triton's interpreter; the NVFP4 product itself is not",
    cases=tuple(_case(name, format) for format in ("nvfp4", "mxfp4") for name in ROWS),
)
