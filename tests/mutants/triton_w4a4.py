"""Bugs of the W4A4 Triton kernel, each caught by a wrong result in Triton's interpreter.

Those of what it shares with the weight-only kernel are in triton_w4a16.py.
"""

from tests.mutants import Mutant

# What every mutant is run on: (format, name in triton_cases.CASES).
CAUGHT_BY = (("nvfp4", "nan scale"), ("mxfp4", "nan scale"))

MUTANTS = tuple(
    Mutant(name, old, new, caught_by="numerics")
    for name, old, new in (
        (
            "scales of the first step of x",
            "load(x_scales, rows_M, k // BLOCK + blocks_S,",
            "load(x_scales, rows_M, blocks_S,",
        ),
        (
            "scales of the first step of w",
            "load(scales, outputs_N, k // BLOCK + blocks_S,",
            "load(scales, outputs_N, blocks_S,",
        ),
        (
            "codes of the first step of x",
            "load(x_codes, rows_M, k // 2 + pairs_K,",
            "load(x_codes, rows_M, pairs_K,",
        ),
        (
            "stride of the scales of x in pairs",
            "x_scales += row * (K // BLOCK)",
            "x_scales += row * (K // 2 // BLOCK)",
        ),
        (
            "weights of the first expert for all",
            "codes += weight * (K // 2)\n    scales",
            "codes += weight * 0\n    scales",
        ),
        (
            "scales of the first expert for all",
            "    scales += weight * (K // BLOCK)",
            "    scales += weight * 0",
        ),
        (
            "tail of K taken for even",
            "EVEN: tl.constexpr = K % BLOCK_K == 0",
            "EVEN: tl.constexpr = K % BLOCK == 0",
        ),
        (
            "rows of another expert stored",
            "live_M = (rows_M >= first) & (rows_M < first + rows)",
            "live_M = rows_M < first + rows",
        ),
        (
            "last row of a group lost",
            "(rows_M < first + rows)",
            "(rows_M < first + rows - 1)",
        ),
        (
            "rows of nobody not zeroed",
            "tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty), mask=mask_MN)",
            "tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty), mask=mask_MN & (outputs_N < 0)[None, :])",
        ),
        (
            "sum started anew at each step",
            "w_NP, w_NS, acc_MN, BLOCK",
            "w_NP, w_NS, acc_MN * 0, BLOCK",
        ),
    )
)
