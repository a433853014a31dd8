"""PTQ methods: the contract that every file of the folder keeps, GPTQ against float64, searches, scale folding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_spec import assert_same
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

from moelab.quant import method, ptq, scale_folding, scale_search
from moelab.quant.ptq import awq, gptq, hadamard_gptq, smoothquant
from pallas_kernels import formats

WEIGHTS = arrays(make_weights())
ROWS = make_rows()
STATISTICS = make_statistics(WEIGHTS, ROWS)


def formats_of(kind):
    allowed = ptq.module(kind).Method.allowed
    return [name for name in method.FP4 if name in allowed]


# Two formats of each kind: 2D tiles, and the one after 1 x 16 blocks.
ALL = [(kind, name) for kind in ptq.KINDS for name in formats_of(kind)[-2:]]


def with_identity(found, diagonal=1.0):
    """Statistics whose Hessians are multiples of the identity."""

    def plain(inputs):
        eye = np.eye(inputs.hessian_EKK.shape[-1], dtype=np.float32) * np.float32(diagonal)
        return dataclasses.replace(
            inputs, hessian_EKK=np.broadcast_to(eye, inputs.hessian_EKK.shape)
        )

    return dataclasses.replace(found, gate_up=plain(found.gate_up), down=plain(found.down))


def layer_output(result, x, e):
    """What one expert computes for rows x with packed weights, as the run time does, in float64."""
    weights = {name: np.asarray(formats.dequantize(result.weights[name])) for name in WEIGHTS}
    x = np.asarray(x, np.float32)
    if method.INPUT_SCALE in result.weights:
        x = x * np.asarray(result.weights[method.INPUT_SCALE])
    if result.rotation is None:
        return experts_output(weights, x, e)[0]
    x = np.asarray(formats.block_hadamard(jnp.asarray(x), result.rotation))
    _, hidden = experts_output(weights, x, e)
    hidden = formats.block_hadamard(jnp.asarray(hidden, jnp.float32), result.rotation)
    return np.asarray(hidden, np.float64) @ weights["down"][e].astype(np.float64).T


# --- the contract ---------------------------------------------------------------------------------


def test_the_folder_is_the_registry():
    assert ptq.KINDS == (
        *("awq", "four_over_six", "gptq", "hadamard_gptq", "rtn"),
        "smoothquant",
    )
    with pytest.raises(ValueError, match="unknown PTQ method 'gptqq'; choose from awq, "):
        ptq.make("gptqq")
    with pytest.raises(ValueError, match="gptq has no field 'dampening'; fields: .*damping"):
        ptq.make("gptq", dampening=1)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_method_gives_packed_weights_close_to_the_function(kind, name):
    result = ptq.make(kind).quantize(WEIGHTS, STATISTICS, name)
    for matrix, w in WEIGHTS.items():
        q = result.weights[matrix]
        assert (q.shape, q.format) == (w.shape, name)
        assert int(formats.count_nonfinite(q)) == 0
        if q.global_amax is not None:
            assert q.global_amax.shape == (EXPERTS,)  # gate and up of an expert share theirs
        report = result.report[matrix]
        for key in ("weight_error", "output_error"):
            assert len(report[key]) == EXPERTS and 0 < max(report[key]) < 0.2
    for e in range(EXPERTS):
        want, _ = experts_output(WEIGHTS, ROWS[e], e)
        error = layer_output(result, ROWS[e], e) - want
        assert np.square(error).sum() < 0.06 * np.square(want).sum()


@pytest.mark.parametrize("kind", [k for k in ptq.KINDS if k not in ("awq", "smoothquant")])
def test_experts_do_not_see_each_other_but_for_shared_input_scales(kind):
    name = formats_of(kind)[0]
    result = ptq.make(kind).quantize(WEIGHTS, STATISTICS, name)
    one = {matrix: w[1:2] for matrix, w in WEIGHTS.items()}
    alone = ptq.make(kind).quantize(one, make_statistics(one, ROWS[1:2]), name)
    for matrix in WEIGHTS:
        found = formats.dequantize(result.weights[matrix])[1]
        same = np.asarray(found == formats.dequantize(alone.weights[matrix])[0]).mean()
        assert same > 0.99  # a Hessian in another rounding may turn a tie


@pytest.mark.parametrize("kind", [k for k in ptq.KINDS if ptq.module(k).Method.needs_statistics])
def test_statistics_that_are_missing_or_of_another_layer_are_refused(kind):
    made, name = ptq.make(kind), formats_of(kind)[0]
    with pytest.raises(
        ValueError, match=f"method {kind} needs statistics of calibration, got None"
    ):
        made.quantize(WEIGHTS, None, name)
    other = make_statistics(make_weights(experts=2), ROWS[:2])
    with pytest.raises(ValueError, match=r"gate_up must have .* = \(3, 64\), got \(2, 64\)"):
        made.quantize(WEIGHTS, other, name)


@pytest.mark.parametrize("kind", ptq.KINDS)
def test_a_layer_that_saw_nothing_gets_finite_weights(kind):
    empty = make_statistics(WEIGHTS, np.zeros((EXPERTS, 0, WIDTH), np.float32))
    name = formats_of(kind)[0]
    result = ptq.make(kind).quantize(WEIGHTS, empty, name)
    for matrix in WEIGHTS:
        assert np.isfinite(formats.dequantize(result.weights[matrix])).all()
        assert result.report[matrix]["output_error"] == [0.0] * EXPERTS
        if "without_hessian" in result.report[matrix]:
            assert result.report[matrix]["without_hessian"] == [0, 1, 2]
    if method.INPUT_SCALE in result.weights:
        assert (result.weights[method.INPUT_SCALE] == 1).all() or kind == "smoothquant"


def test_formats_that_a_method_cannot_make_are_refused():
    with pytest.raises(ValueError, match="gptq cannot make format 'fp8_block'; allowed: nvfp4,"):
        ptq.make("gptq").quantize(WEIGHTS, STATISTICS, "fp8_block")
    with pytest.raises(
        ValueError, match="four_over_six cannot make format 'nvfp4'; allowed: nvfp4_4"
    ):
        ptq.make("four_over_six").quantize(WEIGHTS, None, "nvfp4")
    with pytest.raises(ValueError, match="search must be none for format 'fp8_channel'"):
        ptq.make("rtn", search="mse").quantize(WEIGHTS, None, "fp8_channel")
    with pytest.raises(ValueError, match='search "output" needs statistics'):
        ptq.make("rtn", search="output").quantize(WEIGHTS, None, "nvfp4")
    with pytest.raises(ValueError, match="rotation must divide the inputs of gate_up, 64, got 128"):
        ptq.make("hadamard_gptq", rotation=128).quantize(WEIGHTS, STATISTICS, "nvfp4")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("rtn", {"search": "best"}, "search must be one of none, mse, norm, output, got 'best'"),
        ("rtn", {"smallest": 0}, "smallest must be from 0.015625 to 1, got 0"),
        ("gptq", {"damping": 0}, "damping must be from 1e-06 to 10, got 0"),
        ("hadamard_gptq", {"rotation": 24}, "block must be one of 16, 32, 64, 128, got 24"),
        ("awq", {"steps": 0}, "steps must be from 1 to 1000, got 0"),
        ("smoothquant", {"alpha": 2}, "alpha must be from 0 to 1, got 2"),
        ("four_over_six", {"error": "max"}, "error must be one of mse, mae, got 'max'"),
    ],
)
def test_fields_that_cannot_be_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        ptq.make(kind, **fields)


# --- rounding to nearest --------------------------------------------------------------------------


@pytest.mark.parametrize("name", formats.FORMATS)
def test_rtn_is_quantize(name):
    result = ptq.make("rtn").quantize(WEIGHTS, None, name)
    for matrix, w in WEIGHTS.items():
        assert_same(result.weights[matrix], formats.quantize(w, name, num_batch_axes=1))
    assert result.rotation is None and result.weights.keys() == {"gate_up", "down"}


@pytest.mark.parametrize("rule", ["mse", "mae"])
def test_four_over_six_takes_its_error_or_the_callers_rule(rule):
    want = formats.quantize(WEIGHTS["down"], "nvfp4_46", rule=rule)
    result = ptq.make("four_over_six", error=rule).quantize(WEIGHTS, None, "nvfp4_46")
    assert_same(result.weights["down"], want)
    other = "mae" if rule == "mse" else "mse"
    result = ptq.make("four_over_six", error=other).quantize(WEIGHTS, None, "nvfp4_46", rule)
    assert_same(result.weights["down"], want)


def summed_error(w, q, metric, hessian, spec):
    """Error of each block (or tile) in float64, from the definition."""
    delta = np.asarray(formats.dequantize(q), np.float64) - np.asarray(w, np.float64)
    error = np.zeros(q.scales.shape)
    for e, n, b in np.ndindex(*error.shape):
        here = slice(b * spec.block, (b + 1) * spec.block)
        d, h = delta[e, n, here], np.asarray(hessian[e, here, here], np.float64)
        error[e, n, b] = {
            "mse": d @ d,
            "norm": (np.abs(d) ** 2.4).sum(),
            "output": d @ h @ d,
        }[metric]
    if spec.block_rows > 1:
        error = error.reshape(len(error), -1, spec.block_rows, error.shape[-1]).sum(2)
    return error


@pytest.mark.parametrize(
    ("name", "metric"),
    [("nvfp4", "mse"), ("nvfp4", "norm"), ("nvfp4", "output"), ("nvfp4_2d", "mse")]
    + [("nvfp4_46", "mse"), ("mxfp4", "mse"), ("mxfp4", "output"), ("nvfp4_2d", "output")],
)
def test_a_search_never_raises_its_error_in_any_block(name, metric):
    spec, w = formats.FORMATS[name], WEIGHTS["gate_up"]
    plain = formats.quantize(w, name)
    result = ptq.make("rtn", search=metric).quantize(WEIGHTS, STATISTICS, name)
    found = result.weights["gate_up"]
    hessian = STATISTICS.gate_up.hessian_EKK
    before = summed_error(w, plain, metric, hessian, spec)
    after = summed_error(w, found, metric, hessian, spec)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.995 * before.sum()  # and it finds something
    if spec.block_rows > 1:  # rows of a tile still share their scale
        tiles = np.asarray(found.scales).reshape(EXPERTS, -1, 16, found.scales.shape[-1])
        assert (tiles == tiles[:, :, :1]).all()


def test_the_search_finds_the_best_of_all_scales():
    # By brute force over every scale byte of E4M3 between 0.2 and 1.5 times the start.
    w = WEIGHTS["down"][:, :4]
    start = formats.quantize(w, "nvfp4")
    found = scale_search.Searched(search="mse").rounded(w, None, "nvfp4", None)
    candidates = []
    for offset in range(-19, 6):
        scales = (np.asarray(start.scales, int) + offset).clip(1, 126).astype(np.uint8)
        q = formats.quantize_with(w, dataclasses.replace(start, scales=jnp.asarray(scales)))
        candidates.append(
            summed_error(w, q, "mse", STATISTICS.down.hessian_EKK, formats.FORMATS["nvfp4"])
        )
    best = summed_error(w, found, "mse", STATISTICS.down.hessian_EKK, formats.FORMATS["nvfp4"])
    np.testing.assert_allclose(best, np.min(candidates, axis=0), rtol=1e-5)


def test_a_search_leaves_broken_and_zero_blocks():
    w = jnp.asarray(WEIGHTS["down"]).at[0, 0, 3].set(jnp.nan).at[1, 1, :16].set(0)
    found = scale_search.Searched(search="mse").rounded(w, None, "nvfp4", None)
    value = np.asarray(formats.dequantize(found))
    assert np.isnan(value[0, 0, :16]).all() and np.isnan(value).sum() == 16
    assert (value[1, 1, :16] == 0).all()


# --- GPTQ -----------------------------------------------------------------------------------------


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


# --- scales and rotations -------------------------------------------------------------------------


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
