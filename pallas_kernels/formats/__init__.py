"""Block-scaled low-precision formats: the one definition of the numerics for every backend, QAT, PTQ and export.

>>> from pallas_kernels import formats
>>> q = formats.quantize(x_NK, "nvfp4")
>>> y_NK = formats.dequantize(q)
"""

from pallas_kernels.formats.block_scaled import (
    BlockScaled,
    arranged,
    count_nonfinite,
    dequantize,
    global_scale,
    nbytes,
    quantize,
)
from pallas_kernels.formats.elements import E2M1, E4M3, E5M2, INT4, INT8, Element, Integer
from pallas_kernels.formats.given_scales import nearest, quantize_with, scales_for
from pallas_kernels.formats.hadamard import (
    block_hadamard,
    hadamard_matrix,
    inverse_block_hadamard,
    random_signs,
)
from pallas_kernels.formats.layout import (
    pack,
    swizzle,
    swizzle_groups,
    unpack,
    unswizzle,
    unswizzle_groups,
)
from pallas_kernels.formats.table import FORMATS, Format
from pallas_kernels.formats.views import from_swizzled, mxfp4_to_nvfp4, swizzled_scales

__all__ = [
    "BlockScaled",
    "E2M1",
    "E4M3",
    "E5M2",
    "Element",
    "FORMATS",
    "Format",
    "INT4",
    "INT8",
    "Integer",
    "arranged",
    "block_hadamard",
    "count_nonfinite",
    "dequantize",
    "global_scale",
    "from_swizzled",
    "hadamard_matrix",
    "inverse_block_hadamard",
    "mxfp4_to_nvfp4",
    "nbytes",
    "nearest",
    "pack",
    "quantize",
    "quantize_with",
    "random_signs",
    "scales_for",
    "swizzle",
    "swizzle_groups",
    "swizzled_scales",
    "unpack",
    "unswizzle",
    "unswizzle_groups",
]
