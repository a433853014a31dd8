"""Seeded bugs of the grouped matmul on data-centre Blackwell: in its main loop, and in its epilogue."""

from tests.mutants import Mutant, row_copies

LOOP = (
    Mutant(
        "a stage is loaded before its product is done",
        "plgpu.barrier_wait(self.empty.at[stage])",
        "pass",
        "race",
    ),
    Mutant(
        "a stage is multiplied before it is loaded",
        "plgpu.barrier_wait(self.full.at[stage])",
        "pass",
        "race",
    ),
    Mutant(
        "one copy of a stage is not waited for", "2 + 2 * num_boxes", "1 + 2 * num_boxes", "race"
    ),
    Mutant(
        "an accumulator is overwritten before it is read",
        "plgpu.barrier_wait(self.acc_empty.at[slot])",
        "pass",
        "race",
    ),
    Mutant(
        "an accumulator is read before it is done",
        "plgpu.barrier_wait(self.acc_full.at[slot])",
        "pass",
        "race",
    ),
    Mutant("loads from tensor memory are not waited for", "plgpu.wait_load_tmem()", "pass", "race"),
    Mutant("sums begin with what was there", "accumulate=k > 0", "accumulate=True", "numerics"),
    Mutant(
        "the scales of every step are the first ones",
        "return pl.ds(k * atoms, atoms)",
        "return pl.ds(0, atoms)",
        "numerics",
    ),
    Mutant(
        "the other accumulator is filled",
        "acc = self._accumulator(slot)\n",
        "acc = self._accumulator(self.tiling.accumulators - 1 - slot)\n",
    ),
    Mutant(
        "weights of one expert, scales of another",
        "data.w_scales.at[tile.expert,",
        "data.w_scales.at[0,",
        "numerics",
    ),
)

EPILOGUE = (
    Mutant(
        "an accumulator is given back at its first columns",
        "if chunk == chunks - 1:",
        "if chunk == 0:",
        "race",
    ),
    Mutant(
        "stores begin before registers have arrived",
        "        buffer[...] = value\n        plgpu.commit_smem()\n",
        "        buffer[...] = value\n",
        "race",
    ),
    Mutant(
        "a buffer is overwritten while it is stored",
        "        plgpu.wait_smem_to_gmem(1, wait_read_only=True)\n",
        "",
        "race",
    ),
    Mutant(
        "the scale of another expert",
        "factor = expert_scale_E[tile.expert]",
        "factor = expert_scale_E[0]",
        "numerics",
    ),
    Mutant(
        "the last row is taken for one of nobody",
        "first = jnp.maximum(used - block * TILE_M, 0)",
        "first = jnp.maximum(used - block * TILE_M - 1, 0)",
    ),
)

COPIES = (row_copies.ONE_ROW,)

MUTANTS = (*LOOP, *EPILOGUE, *COPIES)
