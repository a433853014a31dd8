"""PTQ methods: the contract that every file of the folder keeps, rounding to nearest, and the search for scales."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from formats_spec import assert_same
from ptq_cases import (
    EXPERTS,
    WIDTH,
    arrays,
    experts_output,
    make_rows,
    make_statistics,
    make_weights,
)

from moelab.quant import method, ptq, scale_search
from pallas_kernels import formats

WEIGHTS = arrays(make_weights())
ROWS = make_rows()
STATISTICS = make_statistics(WEIGHTS, ROWS)


def formats_of(kind):
    allowed = ptq.module(kind).Method.allowed
    return [name for name in method.FP4 if name in allowed]


# Two formats of each kind: 2D tiles, and the one after 1 x 16 blocks.
ALL = [(kind, name) for kind in ptq.KINDS for name in formats_of(kind)[-2:]]


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


@pytest.mark.parametrize("kind", [k for k in ptq.KINDS if ptq.make(k).needs_statistics])
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
    with pytest.raises(ValueError, match="rtn needs statistics"):
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
