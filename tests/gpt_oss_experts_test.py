"""Experts as gpt-oss has them: gate and up interleaved, biases, clamped SwiGLU, and widths that a kernel wants padded.

T rows, N outputs, K inputs, E experts, D model width, F expert width.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from moelab.quant import packing
from pallas_kernels import GPT_OSS, SWIGLU, MatmulPrecision, SwiGLU, device, formats
from pallas_kernels.grouped_matmul import choice, kernels, loading

E, D, F, T = 3, 96, 64, 12
B200 = device.Device("gpu", "B200", (10, 0), 2)
H100 = device.Device("gpu", "H100", (9, 0), 2)
SIZES = jnp.array([5, 0, 4], jnp.int32)


def draw(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.float32)


X, GATE_UP, DOWN = draw(0, T, D), draw(1, E, 2 * F, D, scale=0.3), draw(2, E, D, F, scale=0.2)
BIAS = draw(3, E, 2 * F), draw(4, E, D)


def expert_by_hand(x, gate_up, down, bias, activation):
    """One row by one expert in float64, with the formula written out."""
    x, gate_up, down, b1, b2 = (np.asarray(a, np.float64) for a in (x, gate_up, down, *bias))
    gate, up = np.split(gate_up @ x + b1, 2)
    if activation.limit:
        gate, up = (
            np.minimum(gate, activation.limit),
            np.clip(up, -activation.limit, activation.limit),
        )
    return down @ (gate / (1 + np.exp(-activation.alpha * gate)) * (up + activation.offset)) + b2


def test_the_activation_by_hand():
    # 1 * sigmoid(1.702) * (0.5 + 1) = 0.845796 * 1.5
    # 9 counts 7, -8 counts -7: 7 * sigmoid(11.914) * (-7 + 1) = 7 * 0.9999933 * -6
    # -30 is not clamped: -30 * sigmoid(-51.06) = -30 * 6.68226e-23; 10 counts 7: times 8
    # -3 * sigmoid(-5.106) * (7 + 1) = -3 * 0.00602377 * 8
    gate, up = [1.0, 9.0, -30.0, -3.0], [0.5, -8.0, 10.0, 10.0]
    act = GPT_OSS(jnp.array([gate + up]))[0]
    np.testing.assert_allclose(act, [1.268694, -41.99972, -1.60374e-20, -0.144570], rtol=5e-6)
    # 2 * sigmoid(2) * 3
    np.testing.assert_allclose(SWIGLU(jnp.array([[2.0, 3.0]])), [[5.284782]], rtol=1e-6)


def test_limits_pass_nan_and_stop_gradients():
    nan, inf = jnp.nan, jnp.inf
    act = GPT_OSS(jnp.array([[nan, 1.0, inf, 1.0, nan, -inf]]))[0]
    assert np.isnan(act[:2]).all()
    np.testing.assert_allclose(act[2], 7 * (1 - 7), rtol=1e-5)  # infinities count as the limit
    grad = jax.grad(lambda hidden: GPT_OSS(hidden).sum())(jnp.array([[8.0, 2.0, 1.0, -9.0]]))
    assert grad[0, 0] == 0 and grad[0, 3] == 0 and np.all(grad[0, 1:3] != 0)


@pytest.mark.parametrize(
    "options, message",
    [(dict(limit=0.0), "limit must be"), (dict(alpha=float("nan")), "alpha and offset must be")],
)
def test_activation_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SwiGLU(**options)


def test_gate_and_up_are_taken_apart():
    rows = jnp.arange(6.0)[:, None] * jnp.ones((1, 2))
    np.testing.assert_array_equal(loading.deinterleaved(rows)[:, 0], [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(
        loading.deinterleaved(jnp.arange(4)[None], axis=-1), [[0, 2, 1, 3]]
    )


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("layout", ["linear", "tcgen05"])
def test_packed_gate_and_up_are_taken_apart(format, layout):
    w = formats.arranged(formats.quantize(draw(5, 2, 8, 64), format), layout)
    apart = loading.deinterleaved(w)
    assert apart.layout == layout and apart.shape == w.shape
    wanted = loading.deinterleaved(formats.dequantize(w))
    np.testing.assert_array_equal(formats.dequantize(apart), wanted)
    assert np.any(wanted != formats.dequantize(w))


def test_blocks_of_a_checkpoint():
    """value = (-1)^sign * table[magnitude] * 2^(byte - 127), low nibble first; 32 columns of a row share a byte."""
    rng = np.random.default_rng(15)
    blocks = rng.integers(0, 256, (2, 4, 3, 16)).astype(np.uint8)
    scales = rng.integers(120, 130, (2, 4, 3)).astype(np.uint8)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1)
    values = np.where(nibbles & 8, -1, 1) * table[nibbles & 7]
    wanted = np.ldexp(values, scales[..., None, None].astype(np.int32) - 127).reshape(2, 4, 96)
    packed = loading.from_blocks(jnp.asarray(blocks), jnp.asarray(scales))
    np.testing.assert_array_equal(formats.dequantize(packed), wanted)
    with pytest.raises(ValueError, match=r"got uint8 \(2, 4, 3, 16\) and uint8 \(2, 4, 2\)"):
        loading.from_blocks(jnp.asarray(blocks), jnp.asarray(scales[..., :2]))


def test_what_cannot_be_taken_apart_or_padded():
    with pytest.raises(ValueError, match="an even number of rows, got 3"):
        loading.deinterleaved(jnp.ones((2, 3, 4)))
    tiles = formats.quantize(jnp.ones((2, 32, 32)), "nvfp4_2d")
    with pytest.raises(ValueError, match="scales of their own, got nvfp4_2d"):
        loading.deinterleaved(tiles)
    with pytest.raises(ValueError, match=r"cannot pad \(4, 8\) to \(4, 6\) in 1 parts"):
        loading.padded(jnp.ones((2, 4, 8)), 4, 6)
    with pytest.raises(ValueError, match="got fp8_channel to 64"):
        loading.padded(formats.quantize(jnp.ones((2, 4, 32)), "fp8_channel"), 4, 64)


@pytest.mark.parametrize(
    "format, layout",
    [
        (None, "linear"),
        ("nvfp4", "linear"),
        ("nvfp4_2d", "tcgen05"),
        ("mxfp4", "tcgen05"),
        ("mxfp4", "block_major"),
    ],
)
def test_a_padded_weight_has_zeros_in_each_part(format, layout):
    w = draw(6, E, 32, 96)
    if format:
        w = formats.arranged(formats.quantize(w, format), layout)
    larger = loading.padded(w, 64, 128, parts=2)
    assert larger.shape == w.shape and larger.value.shape == (E, 64, 128)
    values, wanted = (formats.dequantize(a) if format else a for a in (larger.value, w))
    values = np.asarray(values).reshape(E, 2, 32, 128)
    np.testing.assert_array_equal(values[:, :, :16, :96], wanted.reshape(E, 2, 16, 96))
    assert not values[:, :, 16:].any() and not values[..., 96:].any()
    jax.tree.map(np.testing.assert_array_equal, larger.logical(), w)
    assert loading.padded(w, 32, 96) is w


@pytest.mark.parametrize("implementation", ["reference", "xla_windows"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_padded_product_is_the_unpadded_one(packed, implementation):
    """Small integers, so that every order of summation gives the same; so do the gradients of plain weights."""
    rng = np.random.default_rng(7)
    x, bias = (jnp.asarray(rng.integers(-3, 4, s), jnp.float32) for s in ((T, D), (E, 2 * F)))
    w = jnp.asarray(rng.integers(-2, 3, (E, 2 * F, D)), jnp.float32)
    w = formats.quantize(w * 3, "mxfp4") if packed else w
    dy = jnp.asarray(rng.integers(-3, 4, (T, 2 * F)), jnp.float32)

    def run(w):
        def product(x, bias):
            return pallas_kernels.grouped_matmul(
                x, w, SIZES, bias_EN=bias, implementation=implementation
            )

        y, back = jax.vjp(product, x, bias)
        return y, *back(dy)

    for got, want in zip(run(loading.padded(w, 160, 128, parts=2)), run(w), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not packed or np.any(run(w)[0])


@functools.cache
def rows_and_gradients(implementation, activation, precision=None, biased=True):
    @jax.jit
    def run(x, gate_up, down, bias, dy):
        def mlp(x, gate_up, down, bias):
            return pallas_kernels.expert_mlp(
                *(x, gate_up, down, SIZES),
                activation=activation,
                bias=bias if biased else (None, None),
                precision=precision,
                implementation=implementation,
            )

        y, back = jax.vjp(mlp, x, gate_up, down, bias)
        return y, back(dy)

    return run


CLOSE = dict(rtol=1e-4, atol=2e-5)  # float32 sums of 96 and 64 products in another order
QUANTIZED = MatmulPrecision(x="mxfp4", w="mxfp4", dy="mxfp4")


@pytest.mark.parametrize("implementation", ["reference", "xla_windows", "ragged_dot"])
def test_experts_by_hand(implementation):
    y, back = rows_and_gradients(implementation, GPT_OSS)(X, GATE_UP, DOWN, BIAS, X)
    expert = np.repeat(np.arange(E), SIZES)
    for t, e in enumerate(expert):
        weights = GATE_UP[e], DOWN[e], [b[e] for b in BIAS]
        np.testing.assert_allclose(y[t], expert_by_hand(X[t], *weights, GPT_OSS), **CLOSE)
    assert not np.any(y[len(expert) :])
    wanted = rows_and_gradients("reference", GPT_OSS)(X, GATE_UP, DOWN, BIAS, X)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), back, wanted)
    # What reaches the last bias is the sum of what reaches an expert's rows.
    rows = np.asarray(X, np.float64)
    by_hand = [rows[:5].sum(0), rows[5:5].sum(0), rows[5:9].sum(0)]
    np.testing.assert_allclose(back[3][1], by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla_windows", "ragged_dot"])
def test_another_activation_without_biases(implementation):
    """`xla_windows` has one loop for SwiGLU: without biases the activation alone keeps others out of it."""
    y, back = rows_and_gradients(implementation, GPT_OSS, biased=False)(X, GATE_UP, DOWN, BIAS, X)
    nothing = [np.zeros_like(b[0]) for b in BIAS]
    for t, e in enumerate(np.repeat(np.arange(E), SIZES)):
        wanted = expert_by_hand(X[t], GATE_UP[e], DOWN[e], nothing, GPT_OSS)
        np.testing.assert_allclose(y[t], wanted, **CLOSE)
    wanted = rows_and_gradients("reference", GPT_OSS, biased=False)(X, GATE_UP, DOWN, BIAS, X)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), back, wanted)
    unbiased = routed(X, GATE_UP, DOWN, (None, None), implementation=implementation)
    wanted = routed(X, GATE_UP, DOWN, (None, None), implementation="reference")
    np.testing.assert_allclose(unbiased, wanted, **CLOSE)


@pytest.mark.slow
def test_biases_of_quantized_layers():
    """With quantized gradients the bias is added after the product: its gradient is a sum, in float32."""
    got = rows_and_gradients("xla_windows", GPT_OSS, QUANTIZED)(X, GATE_UP, DOWN, BIAS, X)
    want = rows_and_gradients("reference", GPT_OSS, QUANTIZED)(X, GATE_UP, DOWN, BIAS, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)
    without = rows_and_gradients("reference", GPT_OSS, QUANTIZED, biased=False)
    assert np.abs(want[0] - without(X, GATE_UP, DOWN, BIAS, X)[0])[:9].max() > 0.5
    np.testing.assert_allclose(got[1][3][1][0], np.asarray(X[:5]).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla_windows", "ragged_dot"])
def test_gradients_inside_shard_map_are_a_devices_own(implementation):
    """Weights and biases that differ between devices get gradients that do; JAX looks at the types, even of one."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(gate_up, down, bias):
        options = dict(precision=QUANTIZED, implementation=implementation, bias=bias)
        return pallas_kernels.expert_mlp(X, gate_up, down, SIZES, activation=GPT_OSS, **options)

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(f(*a) * X), argnums=(0, 1, 2)))(
            GATE_UP, DOWN, BIAS
        )

    split = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=split, out_specs=split)
    got, want = gradients(mapped), gradients(loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_no_gradient_of_a_bias_is_a_scatter():
    """A GPU's scatter-add sums in any order, so that two runs would differ."""

    def loss(bias):
        options = dict(bias=bias, activation=GPT_OSS, implementation="ragged_dot")
        return pallas_kernels.expert_mlp(X, GATE_UP, DOWN, SIZES, **options).sum()

    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(BIAS))


def interleaved(halves):
    """Rows gate, up, gate, up .. as a checkpoint has them."""
    return jnp.stack(jnp.split(halves, 2, axis=1), axis=2).reshape(halves.shape)


def routed(x, gate_up, down, bias, **options):
    weight = jnp.linspace(0.1, 1.0, 2 * T)
    expert = jnp.asarray([0, 2, 2, 1, 3, 0] * 4, jnp.int32)  # 3: nobody
    return pallas_kernels.routed_expert_mlp(
        *(x, jnp.repeat(jnp.arange(T), 2), expert, weight, gate_up, down),
        assignments_per_token=2,
        activation=GPT_OSS,
        bias=bias,
        **options,
    )


@pytest.mark.parametrize("here", [B200, H100], ids=str)
def test_weights_are_padded_for_a_device_once(here):
    """2880 is no multiple of 256; Hopper's kernel takes multiples of 64, so nothing is missing there."""
    gate_up, down = (
        jax.eval_shape(lambda shape=shape: formats.quantize(jnp.zeros(shape), "mxfp4"))
        for shape in ((2, 5760, 2880), (2, 2880, 2880))
    )
    activations = "mxfp4" if here is B200 else None
    load = functools.partial(choice.for_device, activations=activations, here=here)
    wide = jax.eval_shape(functools.partial(load, parts=2), gate_up)
    narrow = jax.eval_shape(load, down)
    assert wide.shape == (2, 5760, 2880) and narrow.shape == (2, 2880, 2880)
    if here is H100:
        assert wide.layout == narrow.layout == "block_major"
        return
    assert wide.value.shape == (2, 6144, 3072) and narrow.value.shape == (2, 3072, 3072)
    assert wide.value.layout == "tcgen05"
    plain = jax.ShapeDtypeStruct((2, 5760, 2880), jnp.float32)
    assert jax.eval_shape(load, plain).shape == plain.shape  # multiplied as it is
    quantized = jax.eval_shape(functools.partial(load, parts=2, weights="mxfp4"), plain)
    assert quantized.value.shape == (2, 6144, 3072)
    # Too small to be worth it: 64 would become 256.
    assert load(formats.quantize(jnp.ones((2, 64, 64)), "mxfp4")).shape == (2, 64, 64)


def test_a_models_experts_are_padded_when_loaded():
    """Gate and up, which lie in one matrix, are padded each; layers come as a leading axis."""
    shapes = {"gate_up": (2, E, 384, 192), "down": (2, E, 192, 192)}
    experts = {name: formats.quantize(jnp.ones(s), "mxfp4") for name, s in shapes.items()}
    with device.assume(B200):
        loaded = packing.for_device({"moe": {"experts": experts}}, "mxfp4")["moe"]["experts"]
    for name, wide in (("gate_up", (2, E, 512, 256)), ("down", (2, E, 256, 256))):
        assert loaded[name].shape == shapes[name] and loaded[name].value.shape == wide
    jax.tree.map(np.testing.assert_array_equal, packing.as_packed(loaded), experts)
    values = formats.dequantize(loaded["gate_up"].value)
    assert values[:, :, [0, 191, 256, 447], :192].all() and not values[:, :, [192, 255, 448]].any()


def test_routed_experts_padded_or_not():
    """On a CPU nobody pads, but a weight that was padded for a GPU is the same weight."""
    packed = formats.quantize(GATE_UP, "mxfp4"), formats.quantize(DOWN, "mxfp4")
    larger = loading.padded(packed[0], 256, 128, parts=2), loading.padded(packed[1], 128, 128)

    def run(weights, implementation):
        y, back = jax.vjp(
            lambda x, bias: routed(x, *weights, bias, implementation=implementation), X, BIAS
        )
        return y, *back(X)

    want = run(packed, "reference")
    # As if it were one matrix: the zeros of gate would be all behind up.
    in_one = loading.padded(packed[0], 256, 128)
    for weights in (larger, (larger[0], packed[1]), (in_one, larger[1])):
        got = run(weights, "xla_windows")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, want)


@pytest.mark.parametrize("format", [pytest.param("nvfp4", marks=pytest.mark.slow), "mxfp4"])
def test_a_checkpoint_in_the_kernels_of_a_b200(format):
    """Interleaved rows, 192 wide: taken apart and padded to 256 when loaded, then multiplied in fused kernels."""
    width = 192
    gate_up, down = draw(8, E, 2 * width, width) / 8, draw(9, E, width, width) / 14
    bias = draw(10, E, 2 * width), draw(11, E, width)
    x, precision = draw(12, T, width), MatmulPrecision(x=format, w=format)
    stored = formats.quantize(interleaved(gate_up), format), formats.quantize(down, format)
    apart = loading.deinterleaved(stored[0]), stored[1]
    biases = loading.deinterleaved(interleaved(bias[0]), axis=-1), bias[1]
    np.testing.assert_array_equal(biases[0], bias[0])
    options = dict(precision=precision, bias=biases)
    want = routed(x, *apart, implementation="reference", **options)
    with device.assume(B200), kernels.interpreted(plgpu.InterpretGPUParams()):
        loaded = choice.for_device(apart[0], format, parts=2), choice.for_device(apart[1], format)
        assert all(isinstance(w, loading.Padded) for w in loaded)
        got = routed(x, *loaded, implementation="mosaic_sm100", **options)
    assert got.shape == want.shape == (T, width)
    # The layer between is quantized from another dtype: some codes are their neighbours.
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 0.03, error


def test_plain_weights_that_are_trained_in_four_bits():
    """Padded before training, they are quantized in each step; what is padding gets no gradient."""
    width, precision = 192, MatmulPrecision(x="mxfp4", w="mxfp4")
    w, x = draw(13, E, 2 * width, width) / 14, draw(14, T, width)

    def gradient(w):
        def product(w):
            options = dict(implementation="reference")
            return pallas_kernels.quantized_grouped_matmul(x, w, SIZES, precision, **options)

        y, back = jax.vjp(product, w)
        return y, back(jnp.ones_like(y))[0]

    larger = choice.for_device(w, "mxfp4", B200, parts=2, weights="mxfp4")
    (y, dw), (wanted, dw_wanted) = gradient(larger), gradient(w)
    np.testing.assert_allclose(y, wanted, **CLOSE)
    np.testing.assert_allclose(dw.logical(), dw_wanted, **CLOSE)
    assert np.count_nonzero(dw.value) == np.count_nonzero(dw_wanted) > 0


def test_refuses():
    def refused(message, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            pallas_kernels.expert_mlp(*(arguments or (X, GATE_UP, DOWN)), SIZES, **options)

    refused(r"bias of gate_up must be \(E, 2F\) = \(3, 128\)", bias=(BIAS[1], None))
    refused(r"bias of down must be \(E, D\) = \(3, 96\)", bias=(None, BIAS[0]))
    refused("bias of down must be float32", bias=(None, jnp.ones((E, D), jnp.int32)))
    larger = loading.padded(GATE_UP, 256, 128, parts=2)
    refused(r"same K, got \(12, 128\) and \(3, 128, 96\)", jnp.ones((T, 128)), larger, DOWN)
    with pytest.raises(ValueError, match=r"x must be \(T, 96\) .* got \(12, 128\)"):
        pallas_kernels.grouped_matmul(jnp.ones((T, 128)), larger, SIZES)
    with pytest.raises(
        ValueError, match=r"bias must be \(E, N\) = \(3, 128\), got shape \(3, 96\)"
    ):
        pallas_kernels.grouped_matmul(X, larger, SIZES, bias_EN=BIAS[1])
