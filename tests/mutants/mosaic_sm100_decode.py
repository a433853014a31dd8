"""Seeded bugs of the grouped matmul of few rows on data-centre Blackwell; those of its main loop are another file's."""

from tests.mutants import Mutant, row_copies

OWN = (
    Mutant(
        "a stage is loaded before its product is done",
        "stage = self._wait_to_load(local_index * num_steps + k)",
        "stage = lax.rem(local_index * num_steps + k, jnp.int32(self.tiling.stages))",
        "race",
    ),
    Mutant(
        "weights of one expert, scales of another",
        "data.w_scales.at[tile.expert,",
        "data.w_scales.at[0,",
        "numerics",
    ),
    Mutant(
        "a block has the scales of the first",
        "data.x_scales.at[pl.ds(tile.block, 1), scales]",
        "data.x_scales.at[pl.ds(0, 1), scales]",
        "numerics",
    ),
    Mutant(
        "scales of rows are tiled by 128 rows, not by block",
        "blocks = scales.reshape(-1, tile_t, scales.shape[-1])",
        "blocks = jnp.broadcast_to(scales[:tile_t], (len(scales) // tile_t, tile_t, scales.shape[1]))",
        "numerics",
    ),
    Mutant(
        "the accumulator is given back before it is read",
        "    y_NT = plgpu.async_load_tmem(acc, layout=layout)\n    release()\n",
        "    release()\n    y_NT = plgpu.async_load_tmem(acc, layout=layout)\n",
        "race",
    ),
    Mutant(
        "the buffer is overwritten while it is stored",
        "    plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n    y_NT = ",
        "    y_NT = ",
        "race",
    ),
    Mutant(
        "stores begin before registers have arrived",
        "optimized=False)\n    plgpu.commit_smem()\n",
        "optimized=False)\n",
        "race",
    ),
    Mutant(
        "the scale of another expert",
        "factor = expert_scale_E[tile.expert]",
        "factor = expert_scale_E[0]",
        "numerics",
    ),
    Mutant(
        "the first row of nobody is not cleared",
        "to = used + lax.div(piece, across) * height",
        "to = used + 1 + lax.div(piece, across) * height",
    ),
)

COPIES = (row_copies.ONE_ROW,)

MUTANTS = (*OWN, *COPIES)
