"""Block-scaled low-precision formats: the one definition of the numerics for every backend, QAT, PTQ and export.

>>> from pallas_kernels import formats
>>> q = formats.quantize(x_NK, "nvfp4")
>>> y_NK = formats.dequantize(q)
"""

from pallas_kernels.formats.block_scaled import (
    FORMATS,
    BlockScaled,
    Format,
    dequantize,
    nbytes,
    quantize,
)
from pallas_kernels.formats.elements import E2M1, E4M3, E5M2, Element
from pallas_kernels.formats.layout import pack, swizzle, unpack, unswizzle

__all__ = [
    "E2M1",
    "E4M3",
    "E5M2",
    "FORMATS",
    "BlockScaled",
    "Element",
    "Format",
    "dequantize",
    "nbytes",
    "pack",
    "quantize",
    "swizzle",
    "unpack",
    "unswizzle",
]
