"""Products and gradients on the GPU against float64 and against the reference backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import INTERPRETED
from products import expected, packed, product, unit_scales

import pallas_kernels
from pallas_kernels import GPT_OSS, SWIGLU, MatmulPrecision, formats, schedules
from pallas_kernels.grouped_matmul.kernels import KERNELS

SIZES = [
    [128, 128],
    [1, 0],
    [0, 37],
    [100, 0],
    [61, 130],
]


def random(format, rows, experts=2, columns=128, depth=512):
    x = jax.random.normal(jax.random.key(0), (rows, depth))
    w = jax.random.normal(jax.random.key(1), (experts, columns, depth))
    return (formats.quantize(a, format, num_batch_axes=1) for a in (x, w))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_small_integers_are_exact(kernel, format, sizes):
    """Integers times powers of two, sums below 2^24: every order of summation gives the same."""
    draw = np.random.default_rng(0)
    x = packed(draw.integers(0, 16, (256, 512)), unit_scales((256, 512), format), format)
    w = packed(draw.integers(0, 16, (2, 128, 512)), unit_scales((2, 128, 512), format), format)
    y = product(kernel, x, w, sizes)
    np.testing.assert_array_equal(y, expected(x, w, sizes))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_random_operands(kernel, format, sizes):
    x, w = random(format, 256)
    if "bfloat16" in kernel.x:  # what such a kernel is given
        x = formats.quantize(formats.dequantize(x).astype(jnp.bfloat16), format, num_batch_axes=1)
    want = expected(x, w, sizes)
    scale = np.abs(want).max()
    got = product(kernel, x, w, sizes)
    # bfloat16 activations lose 2^-9 of each; codes lose nothing, and float32 sums of 512 products about 1e-6.
    tolerance = 2e-3 if "bfloat16" in kernel.x else 2e-6
    assert np.abs(got - want).max() <= tolerance * scale
    assert not got[sum(sizes) :].any()
    half = product(kernel, x, w, sizes, jnp.bfloat16)
    np.testing.assert_allclose(half.astype(np.float64), want, rtol=2**-8, atol=tolerance * scale)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("tiling", schedules.SM100_SWAPPED)
def test_swapped_operands(here, monkeypatch, tiling, format):
    """Few rows, whatever tiling the roofline would take: an expert with several blocks, blocks that experts share."""
    if not here.is_tcgen05:
        pytest.skip(f"operands are swapped on sm_10x only, this is {here}")
    monkeypatch.setattr(schedules, "choose_sm100", lambda *_: tiling)
    sizes = [3, 0, 70, 1]
    x, w = random(format, 80, experts=4)
    want = expected(x, w, sizes)
    got = product(KERNELS["mosaic_sm100"], x, w, sizes)
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
    assert not got[sum(sizes) :].any()


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_gradients_against_the_reference(here, format):
    """All three products of training in 4 bits, through the public function."""
    if not here.is_tcgen05:
        pytest.skip(f"training in 4 bits has kernels on sm_10x only, this is {here}")
    x, w = (
        jax.random.normal(jax.random.key(0), (256, 256)),
        jax.random.normal(jax.random.key(1), (2, 256, 256)),
    )
    dy = jax.random.normal(jax.random.key(2), (256, 256))
    two_d = "nvfp4_2d" if format == "nvfp4" else format
    precision = MatmulPrecision(x=format, w=two_d, dy=format, hadamard=16)
    sizes = jnp.array([77, 150], jnp.int32)

    def run(implementation):
        def call(x, w):
            options = dict(implementation=implementation)
            return pallas_kernels.quantized_grouped_matmul(x, w, sizes, precision, **options)

        y, back = jax.vjp(call, x, w)
        return y, *back(dy)

    for one, other in zip(run("mosaic_sm100"), run("reference"), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("activation", [SWIGLU, GPT_OSS], ids=["SwiGLU", "gpt-oss"])
def test_packed_experts_in_fused_kernels(here, format, activation):
    """Gate, up and the activation in one kernel, to bfloat16 (NVFP4 per token) or to codes (MXFP4); then down."""
    if not here.is_tcgen05:
        pytest.skip(f"experts are fused on sm_10x only, this is {here}")
    keys = jax.random.split(jax.random.key(0), 6)
    x, weight = jax.random.normal(keys[0], (40, 256)), jax.random.uniform(keys[1], (80,))
    gate_up = formats.quantize(jax.random.normal(keys[2], (3, 512, 256)) / 16, format)
    down = formats.quantize(jax.random.normal(keys[3], (3, 256, 256)) / 16, format)
    bias = jax.random.normal(keys[4], (3, 512)), jax.random.normal(keys[5], (3, 256))
    token = jnp.repeat(jnp.arange(40, dtype=jnp.int32), 2)
    expert = jnp.asarray([0, 2, 2, 1, 3, 0, 2, 0] * 10, jnp.int32)  # 3: nobody

    def run(implementation):
        return pallas_kernels.routed_expert_mlp(
            *(x.astype(jnp.bfloat16), token, expert, weight, gate_up, down),
            assignments_per_token=2,
            activation=activation,
            bias=(None, None) if activation is SWIGLU else bias,
            precision=MatmulPrecision(x=format),
            implementation=implementation,
        ).astype(jnp.float32)

    want, got = run("reference"), run("mosaic_sm100")
    # Per row, so that one in the wrong place shows; the layer between is rounded from another dtype: some blocks of
    # MXFP4 get twice the scale.
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() < 0.25, error


def test_quantized_rows_are_those_of_the_definition(here):
    """The kernel that quantizes, bit for bit."""
    quantize = pytest.importorskip("pallas_kernels.quantize")
    if not here.is_tcgen05:
        pytest.skip(f"the quantizing kernel is for sm_10x, this is {here}")
    if INTERPRETED:
        pytest.skip("tests/quantize_sm100_test.py interprets it")
    x = jax.random.normal(jax.random.key(0), (300, 512)).astype(jnp.bfloat16)
    for format in ("nvfp4", "mxfp4"):
        got = quantize.quantize_rows(x, format, implementation="mosaic_sm100")
        want = formats.quantize(x, format, num_batch_axes=1)
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_array_equal(formats.arranged(got, "linear").scales, want.scales)
