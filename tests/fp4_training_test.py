"""A training step in 4 bits: the three kernels' products of codes are those of the VJP over values of the reference.

T rows, N outputs, K inputs, E experts.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import formats, schedules
from pallas_kernels.grouped_matmul import MatmulPrecision, mosaic_sm100, operands
from pallas_kernels.grouped_matmul import mosaic_sm100_wgrad as wgrad
from pallas_kernels.grouped_matmul import transposed_operands as along_tokens

T, N, K, E = 96, 256, 256, 3
SIZES = jnp.array([30, 0, 61], jnp.int32)
LAUNCH = dict(
    out_dtype=jnp.float32, num_sms=2, interpret=plgpu.InterpretGPUParams(detect_races=True)
)
NVFP4 = MatmulPrecision(
    x="nvfp4", w="nvfp4", dy="nvfp4", x_scale="per_group", hadamard=16, rounding="stochastic"
)
MXFP4 = MatmulPrecision(x="mxfp4", w="mxfp4", dy="mxfp4", hadamard=16)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@jax.jit
def rows_product(x_TK, w_ENK):
    """One product of rows and weights, both codes: global scales go to the epilogue."""
    scale_E = formats.global_scale(w_ENK)
    return mosaic_sm100.grouped_matmul_codes(
        *(x_TK, w_ENK, SIZES),
        expert_scale_E=jnp.ones(E) if scale_E is None else scale_E,
        row_scale_T=formats.global_scale(x_TK),
        tiling=schedules.sm100_tiling("128x128", w_ENK.format, jnp.float32),
        **LAUNCH,
    )


@jax.jit
def tokens_product(dy_BNU, x_BKU, sizes_E):
    """The product over the tokens."""
    (dy, wide_E), (x, _) = (along_tokens.widen(q, sizes_E, wgrad.UNIT) for q in (dy_BNU, x_BKU))
    return wgrad.weight_gradient_codes(
        *(dy, x, wide_E),
        expert_scale_E=along_tokens.expert_scale(dy, x, wide_E),
        tiling=wgrad.default_tiling(jnp.float32),
        **LAUNCH,
    )


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(NVFP4, id="nvfp4"),
        pytest.param(MXFP4, id="mxfp4", marks=pytest.mark.slow),
    ],
)
def test_the_products_of_codes_are_those_of_the_vjp(precision):
    x, w, dy = draw(0, T, K), draw(1, E, N, K) / 16, draw(2, T, N)
    key = jax.random.key(3) if precision.needs_key else None

    def product(x, w):
        options = dict(implementation="reference", key=key)
        return pallas_kernels.quantized_grouped_matmul(x, w, SIZES, precision, **options)

    y, pull = jax.vjp(product, x, w)
    dx, dw = pull(dy)

    # The same by hand: each operand is quantized along its own contraction axis, from high precision.
    keys = (None, None) if key is None else jax.random.split(key)
    dy = dy.at[int(jnp.sum(SIZES)) :].set(0)
    x_TK = operands.rows(x, precision, SIZES)
    w_ENK = operands.weights(w, precision)
    dy_TN = operands.gradient_rows(dy, precision, SIZES, keys[0])
    w_EKN = operands.transposed_codes(w, precision)
    layout = along_tokens.units(SIZES, T, along_tokens.smallest_unit(precision))
    dy_BNU = along_tokens.quantize(dy, layout, precision, precision.dy, key=keys[1])
    x_BKU = along_tokens.quantize(x, layout, precision, precision.x)
    got = {
        "y": (rows_product(x_TK, w_ENK), y),
        "dx": (rows_product(dy_TN, w_EKN), dx),
        "dw": (tokens_product(dy_BNU, x_BKU, layout.sizes_E), dw),
    }
    for name, (one, other) in got.items():
        # Sums of at most 256 exact products differ in order.
        limit = 2e-6 * np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=limit, err_msg=name)
    assert not np.any(got["y"][0][91:]) and not np.any(got["dw"][0][1])
