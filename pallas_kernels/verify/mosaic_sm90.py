"""Cases of the weight-only grouped matmul on Hopper."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from pallas_kernels import machine_code
from pallas_kernels.aot import Compiled, Target
from pallas_kernels.grouped_matmul.mosaic_sm90_tiling import default_tiling
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, Family, Program, capability
from pallas_kernels.verify.shapes import EXPERTS, HIDDEN, WIDTH, array, packed

OUTPUTS, INPUTS = 2 * HIDDEN, WIDTH
K_PER_MMA = 16
# Tokens times experts per token: so many rows of each expert.
ROWS = {"decode": 4, "few rows": 32, "prefill": 128}
# Of one thread, for two weights: decoding takes about 8 of them, scales 2 or 3, the rest of a step 1.
INSTRUCTIONS_PER_PAIR = 13


def _build(target: Target, *, format: str, rows: int) -> Program:
    from pallas_kernels.grouped_matmul import mosaic_sm90

    num_rows = EXPERTS * rows

    def fn(x, w, sizes_E, row_scale_T):
        return mosaic_sm90.grouped_matmul_codes(
            x,
            w,
            sizes_E,
            row_scale_T=row_scale_T,
            num_sms=target.num_sms,
        )

    return fn, (
        array(num_rows, INPUTS, dtype=jnp.bfloat16),
        packed((EXPERTS, OUTPUTS, INPUTS), format, "block_major"),
        array(EXPERTS, dtype=jnp.int32),
        array(num_rows),
    )


def _step(compiled: Compiled) -> list[str]:
    """Returns the names of the instructions of the innermost loop that multiplies."""
    sass = compiled.kernel().sass
    found = machine_code.instructions(sass)
    for start, end in sorted(machine_code.loops(sass), key=lambda loop: loop[1] - loop[0]):
        step = [name for line, name in found if start <= line <= end]
        if any(name.startswith("HGMMA") for name in step):
            return step
    return []


def _one_wait(compiled: Compiled) -> list[str]:
    """ptxas waits after each product if it takes the way they are issued for unsafe: then nothing runs beside them."""
    waits = _step(compiled).count("WARPGROUP.DEPBAR.LE")
    return [] if waits == 1 else [f"{waits} waits for products in a step instead of 1"]


def _decoded_cheaply(tile_k: int, compiled: Compiled) -> list[str]:
    """64 rows of a warpgroup: a thread decodes tile_k / 4 pairs in a step."""
    count, most = len(_step(compiled)), INSTRUCTIONS_PER_PAIR * tile_k // 4
    return [] if 0 < count <= most else [f"{count} instructions in a step, expected up to {most}"]


def _transposed_by_stmatrix(compiled: Compiled) -> list[str]:
    found = compiled.kernel().sass_count(r"STSM.*MT88")
    return [] if found else ["results are not transposed by stmatrix"]


def _case(name: str, format: str) -> Case:
    rows = ROWS[name]
    tiling = default_tiling(rows, OUTPUTS, INPUTS, format, jnp.bfloat16)
    # Rows in the order that the kernel reads, in bfloat16, groups aligned to 8, and where each comes from.
    reordered = EXPERTS * (rows + 7) * (2 * INPUTS + 4)
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
            _one_wait,
            functools.partial(_decoded_cheaply, tiling.tile_k),
            _transposed_by_stmatrix,
            expect.no_spills,
            expect.within_limits,
            expect.memories(shared_at_most=tiling.smem_bytes(format, jnp.bfloat16)),
            expect.packed_as_they_are("args[1].codes", "args[1].scales"),
            expect.temp_at_most(reordered + 64 * 1024),
        ),
        each_gpu=name == "prefill",
    )


FAMILY = Family(
    name="mosaic_sm90",
    about="weight-only grouped matmul, wgmma",
    interpreted="numerics, races, mutants",
    cases=tuple(_case(name, format) for format in ("nvfp4", "mxfp4") for name in ROWS),
)
