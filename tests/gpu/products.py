"""Packed operands written by hand, and products by a kernel: shared by the tests of the hardware job."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device, formats

ONE = 2  # the code of 1.0 in E2M1
UNIT_SCALE = {"nvfp4": 0x38, "mxfp4": 127}  # the scale byte of 1.0
BLOCK = {"nvfp4": 16, "mxfp4": 32}


def packed(code, scale, format: str) -> formats.BlockScaled:
    """A packed array of these codes and scale bytes, [..., R, K] and [..., R, K / block], global scale 1."""
    codes = formats.pack(jnp.asarray(code, jnp.uint8))
    amax = jnp.full(np.shape(code)[:1], 2688.0, jnp.float32) if format == "nvfp4" else None
    rule = formats.FORMATS[format].rules[0]
    return formats.BlockScaled(codes, jnp.asarray(scale, jnp.uint8), amax, format, rule)


def unit_scales(shape: tuple[int, ...], format: str) -> np.ndarray:
    """Scale bytes of 1.0 for codes of that shape."""
    return np.full((*shape[:-1], shape[-1] // BLOCK[format]), UNIT_SCALE[format], np.uint8)


def doubled(byte: np.ndarray, format: str) -> np.ndarray:
    """Scale bytes of twice the value."""
    return byte + (8 if format == "nvfp4" else 1)


def product(kernel, x, w, sizes, out_dtype=jnp.float32) -> np.ndarray:
    """The kernel's product under jit; activations become bfloat16 for a kernel that takes them so."""
    if "bfloat16" in kernel.x:
        x = formats.dequantize(x).astype(jnp.bfloat16)
    here, out_dtype = device.current(), jnp.dtype(out_dtype)
    w = formats.arranged(w, kernel.layout)

    def run(x, w, sizes):
        return kernel.product(x, w, sizes, None, None, out_dtype, here)

    return np.asarray(jax.jit(run)(x, w, jnp.asarray(sizes, jnp.int32)))


def expected(x, w, sizes) -> np.ndarray:
    """The same in float64 from the values."""
    x, w = (np.asarray(formats.dequantize(a), np.float64) for a in (x, w))
    y, start = np.zeros((x.shape[0], w.shape[1])), 0
    for e, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size] @ w[e].T
        start += size
    return y
