"""GPTQ against float64, under identity Hessians, without a factor; and what it does to the output error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_spec import assert_same
from ptq_cases import (
    EXPERTS,
    WIDTH,
    arrays,
    make_rows,
    make_statistics,
    make_weights,
    output_error,
)

from moelab.quant import method, ptq
from moelab.quant.ptq import gptq
from pallas_kernels import formats

WEIGHTS = arrays(make_weights())
ROWS = make_rows()
STATISTICS = make_statistics(WEIGHTS, ROWS)


def with_identity(found, diagonal=1.0):
    """Statistics whose Hessians are multiples of the identity."""

    def plain(inputs):
        eye = np.eye(inputs.hessian_EKK.shape[-1], dtype=np.float32) * np.float32(diagonal)
        return dataclasses.replace(
            inputs, hessian_EKK=np.broadcast_to(eye, inputs.hessian_EKK.shape)
        )

    return dataclasses.replace(found, gate_up=plain(found.gate_up), down=plain(found.down))


def gptq_in_float64(w, hessian, q, damping, order, block):
    """GPTQ as published, one input at a time: rows of the inverse's Cholesky factor, errors pushed to later inputs."""
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    unit = 1.0 if q.global_amax is None else float(q.global_amax) / 2688
    if q.global_amax is None:
        scale = np.ldexp(1.0, np.asarray(q.scales, int) - 127)
    else:
        scale = np.asarray(formats_value(q.scales), np.float64) * unit
    n, k = w.shape
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(k)
    turn = np.argsort(-np.diag(hessian), kind="stable") if order else np.arange(k)
    inverse = np.linalg.inv(damped[np.ix_(turn, turn)])
    upper = np.linalg.cholesky(inverse).T
    left, result = w[:, turn].copy(), np.zeros((n, k))
    for i in range(k):
        step = scale[:, turn[i] // block]
        size = np.abs(left[:, i]) / step
        nearest = codes[np.abs(size[:, None] - codes).argmin(1)]
        value = np.sign(left[:, i]) * nearest * step
        error = (left[:, i] - value) / upper[i, i]
        left[:, i + 1 :] -= np.outer(error, upper[i, i + 1 :])
        result[:, turn[i]] = value
    return result


def formats_value(scales):
    """E4M3 bytes as numbers."""
    byte = np.asarray(scales).astype(int)
    field, mantissa = byte >> 3, byte & 7
    return np.where(field == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (field - 7))


@pytest.mark.parametrize(
    ("name", "order"),
    [("nvfp4", True), ("nvfp4", False), ("mxfp4", True), ("nvfp4_2d", False)],
)
@pytest.mark.parametrize("matrix", ["gate_up", "down"])
def test_gptq_equals_float64_up_to_rare_ties(matrix, name, order):
    made = ptq.make("gptq", damping=0.02, activation_order=order)
    found = made.quantize(WEIGHTS, STATISTICS, name)
    start = formats.quantize(WEIGHTS[matrix], name)
    assert found.report[matrix]["without_hessian"] == []
    np.testing.assert_array_equal(found.weights[matrix].scales, start.scales)  # fixed before
    hessian = method.inputs_of(STATISTICS, matrix).hessian_EKK.astype(np.float64)
    value = formats.dequantize(found.weights[matrix])
    rows_that_differ = 0
    for e in range(EXPERTS):
        want = gptq_in_float64(
            np.asarray(WEIGHTS[matrix][e], np.float64),
            hessian[e],
            jax.tree.map(lambda leaf, e=e: leaf[e], start),
            0.02,
            order,
            formats.FORMATS[name].block,
        )
        close = np.isclose(value[e], want, rtol=1e-5, atol=1e-7)
        rows_that_differ += (~close).any(axis=1).sum()  # from a tie on, a row goes its own way
    assert rows_that_differ <= 0.03 * EXPERTS * len(WEIGHTS[matrix][0])


def test_more_inputs_than_one_pass_equal_float64_too():
    # 384 inputs are three passes of 128.
    rng = np.random.default_rng(5)
    w = rng.standard_normal((1, 8, 384)).astype(np.float32)
    x = make_rows(experts=1, rows=900, width=384)[0].astype(np.float64)
    hessian = (x.T @ x / len(x)).astype(np.float32)[None]
    start = formats.quantize(w, "nvfp4")
    q, good = gptq.propagate(
        jnp.asarray(w), start, jnp.asarray(hessian), damping=0.01, activation_order=True
    )
    one = jax.tree.map(lambda leaf: leaf[0], start)
    want = gptq_in_float64(
        w[0].astype(np.float64), hessian[0].astype(np.float64), one, 0.01, True, 16
    )
    close = np.isclose(formats.dequantize(q)[0], want, rtol=1e-5, atol=1e-7)
    assert bool(good[0]) and close.all(axis=1).sum() >= 7


@pytest.mark.parametrize(
    ("name", "search"),
    [*((name, "none") for name in method.FP4), ("nvfp4", "mse"), ("mxfp4", "output")],
)
def test_under_an_identity_hessian_gptq_rounds_to_nearest_bit_for_bit(name, search):
    plain = with_identity(STATISTICS, 0.37)
    found = ptq.make("gptq", search=search).quantize(WEIGHTS, plain, name)
    want = ptq.make("rtn", search=search).quantize(WEIGHTS, plain, name)
    assert_same(found.weights, want.weights)
    assert found.report["down"]["without_hessian"] == []


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_46", "mxfp4"])
@pytest.mark.parametrize("kind", ["gptq", "hadamard_gptq"])
def test_gptq_lowers_the_output_error_on_correlated_inputs(kind, name):
    found = ptq.make(kind, search="none").quantize(WEIGHTS, STATISTICS, name)
    plain = ptq.make("rtn").quantize(WEIGHTS, STATISTICS, name)
    for matrix in WEIGHTS:
        error, reference = (r.report[matrix]["output_error"] for r in (found, plain))
        assert (np.array(error) < 0.85 * np.array(reference)).all()


def test_the_report_is_the_error_of_the_outputs():
    result = ptq.make("gptq").quantize(WEIGHTS, STATISTICS, "nvfp4")
    value = formats.dequantize(result.weights["down"])
    hessian, w = STATISTICS.down.hessian_EKK, WEIGHTS["down"]
    want = output_error(w, value, hessian) / output_error(np.zeros(w.shape), w, hessian)
    np.testing.assert_allclose(result.report["down"]["output_error"], want, rtol=1e-3)
    np.testing.assert_allclose(
        result.report["down"]["input_amax"], STATISTICS.down.max_abs_EK.max(1), rtol=1e-6
    )


def test_a_hessian_without_a_factor_rounds_that_expert_to_nearest_and_says_so():
    bad = STATISTICS.gate_up.hessian_EKK.copy()
    bad[1] = -bad[1]  # not positive
    gate_up = dataclasses.replace(STATISTICS.gate_up, hessian_EKK=bad)
    statistics = dataclasses.replace(STATISTICS, gate_up=gate_up)
    found = ptq.make("gptq").quantize(WEIGHTS, statistics, "nvfp4")
    assert found.report["gate_up"]["without_hessian"] == [1]
    want = formats.quantize(WEIGHTS["gate_up"], "nvfp4")
    same = (found.weights["gate_up"].codes == want.codes).all(axis=(1, 2))
    np.testing.assert_array_equal(same, [False, True, False])


def test_the_inverse_factor_is_that_of_the_inverse():
    hessian = STATISTICS.gate_up.hessian_EKK[0].astype(np.float64)
    upper, good = gptq.inverse_factor(jnp.asarray(STATISTICS.gate_up.hessian_EKK[0]), 0.01)
    mean = np.mean(np.diag(hessian))
    want = np.linalg.inv(hessian / mean + 0.01 * np.eye(WIDTH))
    upper = np.asarray(upper, np.float64)
    assert bool(good) and np.array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
