"""Bugs of the weight-only Triton kernel, each caught by a wrong result in Triton's interpreter."""

from tests.mutants import Mutant

# What every mutant is run on: (format, name in triton_cases.CASES).
CAUGHT_BY = (("nvfp4", "nan scale"), ("mxfp4", "nan scale"))

MUTANTS = tuple(
    Mutant(name, old, new, caught_by="numerics")
    for name, old, new in (
        (
            "nibbles swapped",
            "tl.interleave(low, high)",
            "tl.interleave(high, low)",
        ),
        (
            "sign dropped",
            "(word * (0x1001 << 12)) & 0x80008000",
            "(word * (0x1001 << 12)) & 0x80000000",
        ),
        (
            "mantissa of codes dropped",
            "& (0x00070007 << SHIFT)",
            "& (0x00060006 << SHIFT)",
        ),
        (
            "half taken for a subnormal of the next binade",
            "UNBIAS: tl.constexpr = 2.0**126",
            "UNBIAS: tl.constexpr = 2.0**127",
        ),
        (
            "NaN scale read as 480",
            'return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)',
            "return value",
        ),
        (
            "bias of E4M3 off by one",
            "half.to(tl.float32) * 256.0",
            "half.to(tl.float32) * 128.0",
        ),
        (
            "NaN exponent read as infinity",
            "field = tl.where(byte == 255, 0x7FC0, field)",
            "field = tl.where(byte == 255, 0x7F80, field)",
        ),
        (
            "scales of the next step",
            "scales_NS = next_NS\n",
            "scales_NS = load(scales, outputs_N, (k + BLOCK_K) // BLOCK + blocks_S, K // BLOCK, inside_N, False)\n",
        ),
        (
            "scales of the first step",
            "ahead_S = (k + BLOCK_K) // BLOCK + blocks_S",
            "ahead_S = blocks_S",
        ),
        (
            "tail of K not masked",
            "mask = mask & (columns < width)[None, :]",
            "mask = mask & (columns < 2 * width)[None, :]",
        ),
        (
            "weights of the next expert",
            "weight = expert.to(tl.int64) * N",
            "weight = (expert.to(tl.int64) + 1) * N",
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
            "scale of the first row for all",
            "row_scale + row + rows_M",
            "row_scale + row + rows_M * 0",
        ),
        (
            "scale of the first expert for all",
            "tl.load(expert_scale + expert)",
            "tl.load(expert_scale)",
        ),
        (
            "bias of the first expert for all",
            "bias + offset + outputs_N",
            "bias + outputs_N",
        ),
        (
            "sum started anew at each step",
            "tl.trans(w_NK), acc_MN)",
            "tl.trans(w_NK), acc_MN * 0)",
        ),
    )
)
