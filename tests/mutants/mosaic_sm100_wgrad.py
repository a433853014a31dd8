"""Seeded bugs of the weight gradient on data-centre Blackwell."""

from tests.mutants import Mutant

MODULE = "pallas_kernels.grouped_matmul.mosaic_sm100_wgrad"
MUTANTS = (
    Mutant(
        "an empty group stores what the accumulator holds",
        "buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)",
        "total = plgpu.async_load_tmem(part, layout=plgpu.Layout.TCGEN05)\n"
        "            buffer[...] = (total * scale).astype(buffer.dtype)",
        "numerics",
    ),
    Mutant(
        "an empty group stores the tile before",
        "@pl.when(tile.steps == 0)",
        "@pl.when(tile.steps < 0)",
        "numerics",
    ),
    Mutant(
        "the ring counts tiles instead of steps",
        "return carry + steps",
        "return carry + jnp.int32(1)",
    ),
    Mutant(
        "loads do not wait for the product",
        "stage = self._wait_to_load(tile.first_step + k)",
        "stage = lax.rem(tile.first_step + k, jnp.int32(self.tiling.stages))",
        "race",
    ),
    Mutant(
        "products do not wait for the store",
        "plgpu.barrier_wait(self.acc_empty.at[slot])",
        "pass",
        "race",
    ),
    Mutant(
        "one accumulator for all tiles",
        "self._multiply_stage(k, stage, self._accumulator(slot))",
        "self._multiply_stage(k, stage, self._accumulator(0))",
    ),
    Mutant(
        "the accumulator is released before its last columns are read",
        "if chunk == chunks - 1:",
        "if chunk == 0:",
        "race",
    ),
    Mutant(
        "stores are not committed to shared memory",
        "plgpu.commit_smem()",
        "pass",
        "race",
    ),
    Mutant(
        "a buffer is overwritten while it is copied out",
        "plgpu.wait_smem_to_gmem(1, wait_read_only=True)",
        "pass",
        "race",
    ),
    Mutant(
        "every group begins at the first unit",
        "unit = tile.first_unit + k",
        "unit = k",
        "numerics",
    ),
    Mutant(
        "global scales of another expert",
        "scale = inputs[0][tile.expert]",
        "scale = inputs[0][0]",
        "numerics",
    ),
    Mutant(
        "groups end where they should begin",
        "first_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])\n    units_E = end_E - first_E",
        "first_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])\n"
        "    units_E, first_E = end_E - first_E, end_E",
        "numerics",
    ),
    Mutant(
        "two experts of one size swap places",
        "expert_E[:, None] < expert_E[None, :]",
        "expert_E[:, None] <= expert_E[None, :]",
        "numerics",
    ),
)
