"""Seeded bugs of the weight-only grouped matmul on Hopper: in its kernel, its decoding, its rows, and around it."""

from tests.mutants import Mutant, row_copies

LOOP = (
    Mutant(
        "a stage is loaded before its product is done",
        "plgpu.barrier_wait(self.empty.at[stage])",
        "pass",
        "race",
    ),
    Mutant(
        "a stage is read before it is loaded",
        "plgpu.barrier_wait(self.full.at[stage])",
        "pass",
        "race",
    ),
    Mutant(
        "one warpgroup frees a stage for both", "num_arrivals=tiling.warpgroups", "num_arrivals=1"
    ),
    Mutant("products are not waited for", "        plgpu.wgmma_wait(0)\n", "", "race"),
    Mutant(
        "a stage is freed before registers are read from it",
        '''overwrites them."""
        plgpu.commit_smem()
''',
        '''overwrites them."""
''',
        "race",
    ),
    Mutant(
        "a result is stored before it is written",
        """optimized=False)
        plgpu.commit_smem()
""",
        """optimized=False)
""",
        "race",
    ),
    Mutant(
        "a result is overwritten while it is stored",
        "plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n        y_NT",
        "y_NT",
        "race",
    ),
    Mutant(
        "both warpgroups have one buffer of results",
        "buffer = self.out.at[warpgroup]",
        "buffer = self.out.at[0]",
        "race",
    ),
    Mutant(
        "both warpgroups multiply the same weight rows",
        "mine = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)",
        "mine = pl.ds(0, ROWS)",
        "numerics",
    ),
    Mutant(
        "the scales of every step are the first ones",
        "pl.ds(k * blocks, blocks)",
        "pl.ds(0, blocks)",
        "numerics",
    ),
    Mutant(
        "rows of nobody are left as they are",
        "jnp.minimum(num_rows - row, height)",
        "jnp.minimum(num_rows - row - 1, height)",
        "numerics",
    ),
)

DECODE = (
    Mutant(
        "scales of neighbouring blocks are swapped",
        "jnp.where(left, spread(2 * i), spread(2 * i + 1))",
        "jnp.where(left, spread(2 * i + 1), spread(2 * i))",
        "numerics",
    ),
)

ROWS = (
    Mutant(
        "groups are not aligned", "return x_TK.at[source_P]", "return x_TK.at[row_P]", "numerics"
    ),
)

MODULES = {
    "mosaic_sm90_loop": LOOP,
    "mosaic_sm90_decode": DECODE,
    "mosaic_sm90_rows": ROWS,
    "row_copies": (row_copies.OTHERS_ROWS,),
}
MUTANTS = tuple((module, mutant) for module, found in MODULES.items() for mutant in found)
