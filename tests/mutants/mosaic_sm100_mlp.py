"""Seeded bugs of the fused feed-forward on data-centre Blackwell: around its epilogues, and in them."""

from tests.mutants import Mutant, row_copies

AROUND = (
    Mutant(
        "every tile takes the first rows of up",
        "width + column * TILE_F)",
        "width)",
        "numerics",
    ),
)
EPILOGUE = (
    Mutant(
        "gate and up are swapped",
        "activation.clamped(load(0), load(1))",
        "activation.clamped(load(1), load(0))",
        "numerics",
    ),
    Mutant(
        "up has the bias of gate",
        "columns = pl.ds(box * width + ",
        "columns = pl.ds(",
        "numerics",
    ),
    Mutant(
        "the bias of another expert",
        "bias_G = next(optional).at[tile.expert]",
        "bias_G = next(optional).at[0]",
        "numerics",
    ),
    Mutant(
        "the maximum of another block",
        "largest_L = blocks.largest(x_LB)",
        "largest_L = blocks.largest(act_LW[:, : FORMATS[format].block])",
        "numerics",
    ),
    Mutant(
        "experts that share a block overwrite each other's scales",
        "outputs[1].at[tile.index,",
        "outputs[1].at[tile.block,",
    ),
    Mutant(
        "scale bytes in the wrong order",
        "word_L | byte_L << 8 * (done % 4)",
        "word_L << 8 | byte_L",
        "numerics",
    ),
    Mutant(
        "codes are overwritten while they are stored",
        "    plgpu.wait_smem_to_gmem(0, wait_read_only=True)\n    word_L, done",
        "    word_L, done",
        "race",
    ),
    Mutant(
        "scales are stored before they are in shared memory",
        "    plgpu.commit_smem()\n    words = scratch",
        "    words = scratch",
        "race",
    ),
    Mutant(
        "the accumulator is released before its last columns are read",
        "if chunk == chunks - 1:",
        "if chunk == 0:",
        "race",
    ),
    Mutant(
        "the calibration of another expert",
        "inputs[-1][tile.expert]",
        "inputs[-1][0]",
        "numerics",
    ),
    Mutant(
        "a ragged tile is put where the block begins",
        "lines = pl.ds(TILE_M - tile.first_row, TILE_M)",
        "lines = pl.ds(TILE_M, TILE_M)",
        "numerics",
    ),
    Mutant(
        "the first row of nobody is not cleared",
        "to = used + (share",
        "to = used + 1 + (share",
    ),
)

COPIES = (row_copies.ONE_ROW,)

MUTANTS = (*AROUND, *EPILOGUE, *COPIES)
