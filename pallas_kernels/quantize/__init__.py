"""Activations to packed FP4 codes and tensor-core scales, row by row, in one pass where a kernel can.

>>> from pallas_kernels import quantize
>>> q = quantize.quantize_rows(x_TK, "nvfp4", token_N=token_N)
"""

from pallas_kernels.quantize.api import FORMATS, IMPLEMENTATIONS, choose, quantize_rows

__all__ = ["FORMATS", "IMPLEMENTATIONS", "choose", "quantize_rows"]
