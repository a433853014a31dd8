"""Grouped products of packed operands for tests of kernels: calls in interpret mode, operands, and what must come out.

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import formats

# Few pseudo-threads stand for asynchronous copies: where two share one, a race between them goes unseen.
INTERPRET = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=32)


def compiled(x, w, sizes_E, *, module, tiling, num_sms=1, **options):
    """Returns a compiled call, and its arguments."""
    options = {"out_dtype": jnp.float32, "interpret": INTERPRET} | options
    scales = {k: options.pop(k, None) for k in ("expert_scale_E", "row_scale_T", "bias_EN")}

    def call(x, w, sizes_E, scales):
        return module.grouped_matmul_codes(
            x, w, sizes_E, tiling=tiling, num_sms=num_sms, **scales, **options
        )

    arguments = x, w, jnp.asarray(sizes_E, jnp.int32), scales
    return jax.jit(call).lower(*arguments).compile(), arguments


def call(*operands, **options):
    """Returns the product."""
    program, arguments = compiled(*operands, **options)
    return program(*arguments)


def exact(rng, format, *shape):
    """Random codes with scales 1/2, 1 and 2: products and sums are multiples of 1/16, small enough for float32."""
    *lead, depth = shape
    powers = {"nvfp4": (48, 56, 64), "mxfp4": (126, 127, 128)}[format]
    codes = formats.pack(jnp.asarray(rng.integers(0, 16, shape), jnp.uint8))
    blocks = (*lead, depth // formats.FORMATS[format].block)
    scales = jnp.asarray(rng.choice(powers, blocks), jnp.uint8)
    amax = jnp.full(lead[:-1], 2688.0, jnp.float32) if format == "nvfp4" else None
    return formats.BlockScaled(codes, scales, amax, format, formats.FORMATS[format].rules[0])


def expected(x, w, sizes, expert_scale_E, row_scale_T=None, bias_EN=None):
    """In float64, with values as quantized: (T, N)."""
    x_TK, w_ENK = (np.asarray(formats.dequantize(q), np.float64) for q in (x, w))
    y_TN = np.zeros((x_TK.shape[0], w_ENK.shape[1]))
    end_E = np.minimum(np.cumsum(sizes), len(x_TK))
    for e, (start, end) in enumerate(zip([0, *end_E[:-1]], end_E, strict=True)):
        y_TN[start:end] = x_TK[start:end] @ w_ENK[e].T * float(expert_scale_E[e])
        if row_scale_T is not None:
            y_TN[start:end] *= np.asarray(row_scale_T, np.float64)[start:end, None]
        if bias_EN is not None:
            y_TN[start:end] += np.asarray(bias_EN[e], np.float64)
    return y_TN


def quantized(rng, format, sizes, num_rows, depth, num_columns):
    """Operands of random numbers, and the scales that the format leaves to the epilogue."""
    x_TK = jnp.asarray(rng.normal(size=(num_rows, depth)), jnp.float32)
    w_ENK = jnp.asarray(rng.normal(size=(len(sizes), num_columns, depth)), jnp.float32)
    x, w = formats.quantize(x_TK, format, num_batch_axes=1), formats.quantize(w_ENK, format)
    expert_scale_E = formats.global_scale(w)
    if expert_scale_E is None:
        expert_scale_E = jnp.ones(len(sizes), jnp.float32)
    return x, w, {"expert_scale_E": expert_scale_E, "row_scale_T": formats.global_scale(x)}
