"""Seeded bugs of the quantize kernel: in its copies and indices, and in its arithmetic (`blocks`)."""

from tests.mutants import Mutant

# Of rows whose maxima the kernel finds, gathered, one with a NaN.
FOUND = (
    Mutant(
        "a slot is read before it is loaded",
        "        plgpu.barrier_wait(refs.full.at[slot])\n        for _,",
        "        for _,",
        "race",
    ),
    Mutant(
        "a slot is loaded before it is read",
        "            plgpu.commit_smem()\n\n            @plgpu.warp_map",
        "            @plgpu.warp_map",
        "race",
    ),
    Mutant(
        "codes are overwritten before they are stored",
        "                plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n                _store",
        "                _store",
        "race",
    ),
    Mutant(
        "scales are overwritten before they are stored",
        "        plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n        _arrange_scales(",
        "        _arrange_scales(",
        "race",
    ),
    Mutant(
        "one copy of a slot is not waited for",
        "num_arrivals=plan.rows * plan.pieces",
        "num_arrivals=-1 + plan.rows * plan.pieces",
    ),
    Mutant(
        "arranged scales are stored before they are visible",
        "words, optimized=False)\n    plgpu.commit_smem()",
        "words, optimized=False)",
        "race",
    ),
    Mutant(
        "rows that only pad the last tile have scales",
        "jnp.int32(plan.num_tokens))",
        "jnp.int32(0))",
        "numerics",
    ),
    Mutant("scales of padding are left as they were", "mine > 0", "mine > empty", "numerics"),
    Mutant(
        "a block with a NaN counts in its row's maximum",
        "amax_L = blocks.amax(blocks.largest(x_LB))",
        "amax_L = blocks.largest(x_LB)",
        "numerics",
    ),
)

# Of MXFP4 rows, gathered and rounded at random, two to a warp.
DRAWN = (
    Mutant(
        "random bits are gathered like rows",
        "refs.random_g.at[row, line, piece]",
        "refs.random_g.at[source, line, piece]",
        "numerics",
    ),
    Mutant(
        "the quarters of a tile are swapped",
        "refs.atoms_s.at[here, within, quarter]",
        "refs.atoms_s.at[here, within, 3 - quarter]",
        "numerics",
    ),
    Mutant(
        "the bytes of a word are reversed", "byte_L << 8 * i", "byte_L << 8 * (3 - i)", "numerics"
    ),
)

# In `blocks`, seen by the first case.
ARITHMETIC = (
    Mutant(
        "a block with a NaN keeps its codes",
        "jnp.where(finite_L, jnp.int32(-1), jnp.int32(0))",
        "jnp.where(finite_L, jnp.int32(-1), jnp.int32(-1))",
        "numerics",
    ),
    Mutant(
        "a step that underflows is used",
        "usable_L = step_L >= jnp.float32(SMALLEST_STEP)",
        "usable_L = step_L >= jnp.float32(0)",
        "numerics",
    ),
)

MUTANTS = (*FOUND, *DRAWN, *ARITHMETIC)
