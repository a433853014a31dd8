"""Scales that are folded, AWQ and SmoothQuant, and Hadamard transforms: the function stays what it was."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from ptq_cases import (
    EXPERTS,
    HIDDEN,
    WIDTH,
    arrays,
    experts_output,
    make_rows,
    make_statistics,
    make_weights,
    output_error,
)

from moelab.quant import method, ptq, scale_folding
from moelab.quant.ptq import awq, hadamard_gptq, smoothquant
from pallas_kernels import formats

WEIGHTS = arrays(make_weights())
ROWS = make_rows()
STATISTICS = make_statistics(WEIGHTS, ROWS)


def some_scales(seed=3):
    rng = np.random.default_rng(seed)
    shapes = (WIDTH,), (EXPERTS, HIDDEN)
    return tuple(jnp.asarray(np.exp(rng.normal(size=s)), jnp.float32) for s in shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_folded_scales_leave_the_function_unchanged(dtype):
    scales = some_scales()
    folded = scale_folding.fold(WEIGHTS, *scales)
    folded = {name: w.astype(dtype).astype(jnp.float32) for name, w in folded.items()}
    x = ROWS / np.asarray(scales[0])
    tolerance = 1e-6 if dtype == jnp.float32 else 0.02
    for e in range(EXPERTS):
        want, hidden = experts_output(WEIGHTS, ROWS[e], e)
        found, scaled = experts_output(folded, x[e], e)
        np.testing.assert_allclose(found, want, atol=tolerance * np.abs(want).max(), rtol=0)
        if dtype == jnp.float32:
            np.testing.assert_allclose(scaled * np.asarray(scales[1])[e], hidden, atol=1e-4)
    back = scale_folding.unfold(folded, *scales)
    if dtype == jnp.float32:
        for name, w in WEIGHTS.items():
            np.testing.assert_allclose(back[name], w, rtol=1e-6)


@pytest.mark.parametrize("kind", ["awq", "smoothquant"])
def test_input_scales_and_maxima_are_those_of_the_scaled_rows(kind):
    result = ptq.make(kind).quantize(WEIGHTS, STATISTICS, "nvfp4")
    scale_D = np.asarray(result.weights[method.INPUT_SCALE])
    assert scale_D.shape == (WIDTH,) and scale_D.dtype == np.float32 and (scale_D > 0).all()
    want = np.abs(ROWS * scale_D).max(axis=(1, 2))
    np.testing.assert_allclose(result.report["gate_up"]["input_amax"], want, rtol=1e-5)
    # The hidden rows of the folded weights: packed gate_up is near them.
    values = {name: formats.dequantize(result.weights[name]) for name in WEIGHTS}
    for e in range(EXPERTS):
        _, hidden = experts_output(values, ROWS[e] * scale_D, e)
        found = result.report["down"]["input_amax"][e]
        assert 0.8 < found / np.abs(hidden).max() < 1.25


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_awq_is_never_above_rounding_to_nearest(name):
    found = ptq.make("awq").quantize(WEIGHTS, STATISTICS, name)
    plain = ptq.make("rtn").quantize(WEIGHTS, STATISTICS, name)
    assert (
        np.array(found.report["down"]["output_error"])
        <= np.array(plain.report["down"]["output_error"]) * (1 + 1e-5)
    ).all()
    tokens = STATISTICS.tokens_E
    totals = output_error(
        np.zeros_like(WEIGHTS["gate_up"]), WEIGHTS["gate_up"], STATISTICS.gate_up.hessian_EKK
    )
    error, reference = (
        np.sum(np.array(r.report["gate_up"]["output_error"]) * totals * tokens)
        for r in (found, plain)
    )
    assert error < 1.01 * reference  # up's rows were scaled too, which moves their rounding
    assert found.report["gate_up"]["alpha"] > 0


def test_awq_chooses_alpha_by_the_output_error():
    # By brute force for down, where each expert chooses its own.
    result = ptq.make("awq", steps=4).quantize(WEIGHTS, STATISTICS, "nvfp4")
    w, hessian = np.asarray(WEIGHTS["down"]), STATISTICS.down.hessian_EKK
    error = []
    for alpha in (0, 0.25, 0.5, 0.75, 1):
        s = STATISTICS.down.mean_abs_EK.astype(np.float64) ** alpha
        s = (s / np.sqrt(s.max(1, keepdims=True) * s.min(1, keepdims=True)))[:, None]
        q = formats.dequantize(formats.quantize((w * s).astype(np.float32), "nvfp4"))
        error.append(output_error(w, np.asarray(q) / s, hessian))
    best = np.array([0, 0.25, 0.5, 0.75, 1])[np.argmin(error, axis=0)]
    np.testing.assert_array_equal(result.report["down"]["alpha"], best)


def test_smoothquant_by_hand():
    # Two experts, channels seen at 4 and 1; largest weights 1 and 4: s = sqrt(4 / 1) = 2, sqrt(1 / 4) = 1/2.
    w = jnp.asarray([[[1.0, -4.0], [0.5, 2.0]], [[2.0, 1.0], [-0.5, 1.0]]], jnp.float32)
    seen = jnp.asarray([[4.0, 1.0], [0.0, 0.0]], jnp.float32)
    found = smoothquant.scale(w, seen, 0.5)
    np.testing.assert_allclose(found, [[2, 0.5], [1, 1]], rtol=1e-6)  # no rows: no scale
    np.testing.assert_allclose(scale_folding.centred(found[0]), [2, 0.5], rtol=1e-6)


def test_gate_ups_scale_is_the_largest_of_the_experts():
    result = ptq.make("smoothquant").quantize(WEIGHTS, STATISTICS, "nvfp4")
    seen = STATISTICS.gate_up.max_abs_EK
    each = np.sqrt(seen / np.abs(np.asarray(WEIGHTS["gate_up"])).max(1))
    want = each.max(0)
    want = want / np.sqrt(want.max() * want.min())
    np.testing.assert_allclose(1 / result.weights[method.INPUT_SCALE], want, rtol=1e-5)


def test_scales_of_statistics_that_are_nothing_are_ones():
    zeros = jnp.zeros((2, 5), jnp.float32)
    np.testing.assert_array_equal(awq.scale(zeros, jnp.float32(0.5)), np.ones((2, 5)))
    some = zeros.at[0, 1].set(3)  # the others are lifted to 3e-4: s = 1 and 0.01, over the mean 0.1
    np.testing.assert_allclose(
        awq.scale(some, jnp.float32(0.5)), [[0.1, 10, 0.1, 0.1, 0.1], [1] * 5], rtol=1e-5
    )


@pytest.mark.parametrize("block", [16, 32])
def test_rotated_rows_times_rotated_weights_are_the_plain_product(block):
    result = ptq.make("hadamard_gptq", rotation=block).quantize(WEIGHTS, STATISTICS, "mxfp4")
    assert result.rotation == block and "input_amax" not in result.report["down"]
    x = formats.block_hadamard(jnp.asarray(ROWS[0]), block)
    w = formats.block_hadamard(WEIGHTS["gate_up"][0], block)
    want = ROWS[0].astype(np.float64) @ np.asarray(WEIGHTS["gate_up"][0], np.float64).T
    found = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    hessian = hadamard_gptq.rotate_hessian(jnp.asarray(STATISTICS.gate_up.hessian_EKK), block)
    rotated = np.asarray(x, np.float64)
    want = rotated.T @ rotated / len(rotated)
    np.testing.assert_allclose(hessian[0], want, atol=1e-4 * math.fabs(want.max()))
