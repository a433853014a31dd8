"""The quantized rows as `formats` defines them, for every platform: what the kernels are compared with.

T tokens, N rows of the output, K contraction axis.
"""

from __future__ import annotations

import jax

from pallas_kernels import formats


def quantize_rows(
    x_TK: jax.Array,
    format: str,
    *,
    rule: str,
    token_N: jax.Array | None = None,
    amax_N: jax.Array | None = None,
    hadamard: int | None = None,
    key: jax.Array | None = None,
) -> formats.BlockScaled:
    """Gathers, transforms, quantizes and arranges, one after the other; see `quantize.quantize_rows`."""
    x_NK = x_TK if token_N is None else x_TK[token_N]
    if hadamard is not None:
        x_NK = formats.block_hadamard(x_NK, hadamard)
    q = formats.quantize(x_NK, format, rule=rule, num_batch_axes=1, key=key, global_amax=amax_N)
    return formats.arranged(q, "tcgen05")
