"""Which kernel computes what; products and gradients through the public functions, kernels in interpret mode."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import MatmulPrecision, device, formats
from pallas_kernels.grouped_matmul import choice, kernels

B200 = device.Device("gpu", "B200", (10, 0), 2)
H100 = device.Device("gpu", "H100", (9, 0), 2)
A100 = device.Device("gpu", "A100", (8, 0), 2)
RTX = device.Device("gpu", "RTX PRO 6000", (12, 0), 2)
CPU = device.CPU
SIZES = jnp.array([30, 0, 61], jnp.int32)


def problem(**fields):
    plain = dict(rows=512, experts=8, outputs=512, inputs=512, x="nvfp4", w="nvfp4")
    return kernels.Problem(**plain | fields)


@pytest.mark.parametrize(
    "here, x, w, name",
    [
        (B200, "nvfp4", "nvfp4", "mosaic_sm100"),
        (B200, "mxfp4", "mxfp4", "mosaic_sm100"),
        (B200, "nvfp4", "nvfp4_2d", "mosaic_sm100"),
        (B200, "nvfp4", "mxfp4", None),
        (B200, "bfloat16", "nvfp4", "triton_w4a16"),
        (H100, "bfloat16", "mxfp4", "mosaic_sm90"),
        (H100, "nvfp4", "nvfp4", None),
        (A100, "bfloat16", "nvfp4", "triton_w4a16"),
        (RTX, "mxfp4", "mxfp4", "triton_w4a4"),
        (B200, "bfloat16", "bfloat16", None),
        (B200, "mxfp8_e4m3", "mxfp8_e4m3", None),
        (CPU, "nvfp4", "nvfp4", None),
    ],
)
def test_what_is_chosen(monkeypatch, here, x, w, name):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda package: object())
    chosen = kernels.choose(problem(x=x, w=w), here)
    assert (chosen and chosen.name) == name


def test_a_named_kernel_says_why_it_cannot_run(monkeypatch):
    x, w = jnp.ones((8, 512)), jnp.ones((2, 128, 512))
    fp4 = MatmulPrecision(x="nvfp4", w="nvfp4")
    with pytest.raises(NotImplementedError, match="capability 10.x, this is cpu"):
        choice.choose("mosaic_sm100", x, w, fp4)
    with device.assume(B200):
        with pytest.raises(NotImplementedError, match="activations in .*, got float32"):
            choice.choose("mosaic_sm100", x, w)
        with pytest.raises(NotImplementedError, match="K a multiple of 256.* got K=384 and N=128"):
            choice.choose("mosaic_sm100", x[:, :384], w[:, :, :384], fp4)
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda package: None)
        with pytest.raises(NotImplementedError, match=r"jax_triton: pip install 'moelab\[aot\]'"):
            choice.choose("triton_w4a16", x.astype(jnp.bfloat16), w, MatmulPrecision(w="nvfp4"))
    with pytest.raises(ValueError, match="unknown implementation 'mosaic'"):
        choice.choose("mosaic", x, w)


def test_xla_computes_what_no_kernel_does():
    assert choice.choose(None, jnp.ones((8, 64)), jnp.ones((2, 64, 64))).kernel is None
    with device.assume(B200):
        plain = choice.choose(None, jnp.ones((8, 64)), jnp.ones((2, 64, 64)))
        assert plain == (pallas_kernels.BACKENDS["ragged_dot"], None)
        packed = formats.quantize(jnp.ones((2, 64, 64)), "mxfp8_e4m3")
        fallback = choice.choose(None, jnp.ones((8, 64)), packed)
        assert fallback == (pallas_kernels.BACKENDS["xla_windows"], None)


def test_the_table_for_people():
    assert set(choice.table(CPU).values()) == {"xla_windows"}
    assert choice.table(B200)["W4A4 nvfp4"] == "mosaic_sm100 (not yet run on hardware)"
    assert choice.table(B200)["bfloat16 experts"] == "ragged_dot"


def test_weights_are_arranged_for_the_device():
    w = formats.quantize(jnp.ones((2, 3, 128, 256)), "nvfp4")
    loaded = choice.for_device(w, "nvfp4", B200)
    assert loaded.layout == "tcgen05"
    assert choice.for_device(loaded, "nvfp4", CPU).layout == "linear"
    assert choice.for_device(loaded, None, B200).layout == "linear"  # Triton's, weight-only
    assert choice.for_device(w, None, H100).layout == "block_major"
    fp8 = formats.quantize(jnp.ones((2, 128, 256)), "fp8_block")
    assert choice.for_device(fp8, None, B200).layout == "linear"


def in_interpreter():
    return kernels.interpreted(plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_forward_and_gradients_agree_with_the_reference(format):
    """The kernel multiplies codes, the reference values; the gradients are straight-through in both."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (96, 256)), jax.random.normal(keys[1], (3, 128, 256))
    dy = jax.random.normal(keys[2], (96, 128))
    precision = MatmulPrecision(x=format, w=format)

    def run(implementation):
        def product(x, w):
            options = dict(implementation=implementation)
            return pallas_kernels.quantized_grouped_matmul(x, w, SIZES, precision, **options)

        y, back = jax.vjp(product, x, w)
        return y, *back(dy)

    want = run("reference")
    with device.assume(B200), in_interpreter():
        got = run("mosaic_sm100")
    for name, one, other in zip(("y", "dx", "dw"), want, got, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-4, err_msg=name)
    assert not np.asarray(got[0][91:]).any() and not np.asarray(got[2][1]).any()


def test_training_in_four_bits_takes_three_kernels():
    """NVIDIA's recipe: 2D weights, gradients in NVFP4, a Hadamard transform along the tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (96, 256)), jax.random.normal(keys[1], (3, 256, 256)) / 16
    dy = jax.random.normal(keys[2], (96, 256))
    precision = MatmulPrecision(x="nvfp4", w="nvfp4_2d", dy="nvfp4", hadamard=16)

    def run(implementation):
        def product(x, w):
            options = dict(implementation=implementation)
            return pallas_kernels.quantized_grouped_matmul(x, w, SIZES, precision, **options)

        y, back = jax.vjp(product, x, w)
        return y, *back(dy)

    want = run("reference")
    with device.assume(B200), in_interpreter():
        got = run("mosaic_sm100")
    for name, one, other in zip(("y", "dx", "dw"), want, got, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-4, err_msg=name)
    assert not np.asarray(got[2][1]).any()


def test_packed_weights_in_tensor_core_layout_give_the_same():
    x = jax.random.normal(jax.random.key(0), (96, 256))
    w = formats.quantize(jax.random.normal(jax.random.key(1), (3, 128, 256)), "nvfp4")
    precision = MatmulPrecision(x="nvfp4")

    def run(w):
        return pallas_kernels.quantized_grouped_matmul(x, w, SIZES, precision)

    want = run(w)
    with device.assume(B200), in_interpreter():
        np.testing.assert_allclose(run(choice.for_device(w, "nvfp4")), want, rtol=2e-5, atol=2e-4)


def test_float16_rows_have_float16_products():
    """The kernel stores float32 or bfloat16; what it makes of float16 rows is rounded once."""
    x = jax.random.normal(jax.random.key(0), (6, 256)).astype(jnp.float16)
    w = formats.quantize(jax.random.normal(jax.random.key(1), (3, 128, 256)), "mxfp4")
    sizes = jnp.array([2, 0, 3], jnp.int32)

    def run(implementation):
        options = dict(implementation=implementation)
        return pallas_kernels.quantized_grouped_matmul(
            x, w, sizes, MatmulPrecision(x="mxfp4"), **options
        )

    want = run("reference")
    with device.assume(B200), kernels.interpreted(plgpu.InterpretGPUParams()):
        got = run("mosaic_sm100")
    assert got.dtype == want.dtype == jnp.float16 and np.any(got)
    # Half a unit in the last place, where a sum in another order is rounded the other way.
    np.testing.assert_allclose(got, want, rtol=2**-10, atol=2**-10)


def test_expert_mlp_runs_both_layers_in_the_kernel():
    x = jax.random.normal(jax.random.key(0), (40, 256))
    gate_up = jax.random.normal(jax.random.key(1), (3, 512, 256)) / 16
    down = jax.random.normal(jax.random.key(2), (3, 256, 256)) / 16
    precision = MatmulPrecision(x="mxfp4", w="mxfp4")
    sizes = jnp.array([7, 0, 30], jnp.int32)

    def run(implementation):
        options = dict(precision=precision, implementation=implementation)
        return pallas_kernels.expert_mlp(x, gate_up, down, sizes, **options)

    want = run("reference")
    with device.assume(B200), in_interpreter():
        got = run("mosaic_sm100")
    # The hidden layer is requantized: a sum in another order may round a code the other way.
    close = np.isclose(got, want, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.97, close.mean()
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision, x_amax",
    [
        (MatmulPrecision(x="nvfp4", w="nvfp4"), (None, None)),
        (MatmulPrecision(x="mxfp4", w="mxfp4"), (None, None)),
        (MatmulPrecision(x="nvfp4", w="nvfp4", x_scale="static"), (4.0, 1.0)),
    ],
    ids=["per token", "MX", "static"],
)
def test_packed_experts_in_fused_kernels(precision, x_amax):
    """Gather and codes, SwiGLU, down with combine weights; the gradient is the unfused composition's."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, weight = jax.random.normal(keys[0], (12, 256)), jax.random.uniform(keys[1], (24,))
    expert = jax.random.randint(keys[2], (24,), 0, 4)  # 3: nobody
    gate_up = formats.quantize(jax.random.normal(keys[3], (3, 512, 256)) / 16, precision.w)
    down = formats.quantize(jax.random.normal(keys[4], (3, 256, 256)) / 16, precision.w)
    x_amax = tuple(None if a is None else jnp.full(3, a) for a in x_amax)
    token = jnp.repeat(jnp.arange(12, dtype=jnp.int32), 2)

    def run(implementation, x):
        return pallas_kernels.routed_expert_mlp(
            x,
            token,
            expert,
            weight,
            gate_up,
            down,
            assignments_per_token=2,
            precision=precision,
            x_amax=x_amax,
            implementation=implementation,
        )

    want = run("reference", x)
    with device.assume(B200), in_interpreter():
        got = run("mosaic_sm100", x)
    # The layer between is quantized from another dtype: some codes are their neighbours.
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 0.03, error
    nobody = np.asarray(expert).reshape(12, 2) == 3
    assert not np.asarray(got)[nobody.all(axis=1)].any()
