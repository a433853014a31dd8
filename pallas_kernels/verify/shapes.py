"""Descriptions of arrays that cases take: nothing is computed. The shapes are those of Qwen3-30B-A3B's experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import formats

EXPERTS, WIDTH, HIDDEN = 128, 2048, 768
ROWS = 4096  # tokens times experts per token


def array(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    """Describes an array, float32 if nothing is said."""
    return jax.ShapeDtypeStruct(shape, dtype)


def packed(shape: tuple[int, ...], format: str, layout: str = "tcgen05") -> formats.BlockScaled:
    """Describes a packed array of this shape, with its scales in linear layout or in that of tensor cores."""

    def quantize(x):
        return formats.arranged(formats.quantize(x, format), layout)

    return jax.eval_shape(quantize, array(*shape))
