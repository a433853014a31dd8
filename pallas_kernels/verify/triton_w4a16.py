"""Cases of the weight-only grouped matmul in Triton, from Ampere to Blackwell."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels.aot import Compiled, Target
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Expectation, Family, Program, capability
from pallas_kernels.verify.shapes import EXPERTS, HIDDEN, WIDTH, array, packed

# Tokens times experts per token: so many rows of each expert.
ROWS = {"decode": 8, "few rows": 64, "prefill": 256}
MMA_SYNC = (r"mma\.sync.*m16n8k16.*bf16.*", r"HMMA\.16816\.F32\.BF16.*")
WGMMA = (r"wgmma\.mma_async.*bf16.*", r"HGMMA\..*BF16.*")
TCGEN05 = (r"tcgen05\.mma.*kind::f16", r"UTCHMMA.*")
# The schedule of tiles.
TEMP_BYTES = 256 * 1024


def _build(target: Target, *, format: str, rows: int) -> Program:
    from pallas_kernels.grouped_matmul import triton_w4a16

    num_rows = EXPERTS * rows

    def fn(x, w, sizes_E, row_scale_T):
        return triton_w4a16.grouped_matmul_codes(
            x, w, sizes_E, row_scale_T=row_scale_T, capability=target.capability
        )

    return fn, (
        array(num_rows, WIDTH, dtype=jnp.bfloat16),
        packed((EXPERTS, 2 * HIDDEN, WIDTH), format, "linear"),
        array(EXPERTS, dtype=jnp.int32),
        array(num_rows),
    )


def _right_mma(rows: int) -> Expectation:
    """bfloat16 MMAs of the architecture's own kind, where a tile has rows enough for it; else those of Ampere."""

    def expectation(compiled: Compiled) -> list[str]:
        from pallas_kernels.grouped_matmul import triton_w4a16

        capability = compiled.target.capability
        t = triton_w4a16.default_tiling(rows, 2 * HIDDEN, WIDTH, capability)
        if capability[0] == 10 and t.block_m >= 64:
            # As many as the pipeline's copies of the loop have.
            return expect.mma(*TCGEN05)(compiled)
        if capability[0] == 9 and t.block_m >= 64:
            kind, size = WGMMA, 64 * t.block_n * 16 * (t.num_warps // 4)
        else:
            kind, size = MMA_SYNC, 16 * 8 * 16 * t.num_warps
        return expect.mma(*kind, count=t.block_m * t.block_n * t.block_k // size)(compiled)

    return expectation


def _keeps_subnormals(compiled: Compiled) -> list[str]:
    """Decoding passes through subnormals: with .ftz a code of 0.5 would be lost."""
    return [f"{k.name}: flushes subnormals" for k in compiled.kernels if ".ftz" in k.ptx]


def _main(target: Target) -> bool:
    """One GPU of each generation; the others differ in size."""
    return target.capability in ((8, 0), (9, 0), (10, 0), (12, 0))


def _case(name: str, format: str) -> Case:
    return Case(
        name=name,
        format=format,
        runs_on=capability(8, 9, 10, 12) if format == "nvfp4" else _main,
        build=functools.partial(_build, format=format, rows=ROWS[name]),
        expectations=(
            expect.num_kernels(1),
            _right_mma(ROWS[name]),
            _keeps_subnormals,
            expect.no_spills,
            expect.within_limits,
            expect.packed_as_they_are(),
            expect.temp_at_most(TEMP_BYTES),
        ),
    )


FAMILY = Family(
    name="triton_w4a16",
    about="weight-only grouped matmul, bfloat16 MMA of each architecture",
    interpreted="numerics and mutants, in Triton's interpreter",
    cases=(
        *(_case(name, "nvfp4") for name in ROWS),
        *(_case(name, "mxfp4") for name in ("decode", "prefill")),
    ),
)
