"""Seeded bugs of `row_copies`, which kernels share: each family is shown one or two."""

from tests.mutants import Mutant

ONE_ROW = Mutant(
    "all pieces of a ragged tile go to one row", "pl.ds(to + done, size)", "pl.ds(to, size)"
)
OTHERS_ROWS = Mutant(
    "rows of the next expert are taken for the last one's",
    "pl.when(rows & size != 0)",
    "pl.when((rows | 8) & size != 0)",
)
