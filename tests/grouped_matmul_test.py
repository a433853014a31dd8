"""Grouped matmul backends against the reference, and the reference against loops by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import pallas_kernels
from pallas_kernels import MatmulPrecision, formats
from pallas_kernels.grouped_matmul import windows

E, K, N = 8, 32, 5
FAST = [name for name in pallas_kernels.BACKENDS if name != "reference"]
# float32 sums of at most 32 products of order 1, in another order.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def by_hand(x, w, sizes, bias=None, row_scale=None):
    """The definition as a loop in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y = np.zeros((x.shape[0], w.shape[1]))
    row = 0
    for expert, size in enumerate(sizes):
        for t in range(row, min(row + size, x.shape[0])):
            y[t] = w[expert] @ x[t]
            y[t] *= 1.0 if row_scale is None else row_scale[t]
            y[t] += 0.0 if bias is None else bias[expert]
        row += size
    return y


@functools.cache
def gradients(implementation):
    """y, dx, dw for a cotangent, group sizes traced: compiled once per shape."""

    @jax.jit
    def run(x, w, sizes, dy):
        def product(x, w):
            return pallas_kernels.grouped_matmul(x, w, sizes, implementation=implementation)

        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy)

    return run


@pytest.mark.parametrize("implementation", pallas_kernels.BACKENDS)
def test_three_rows_by_hand(implementation):
    # expert 0 has rows 0, 1; expert 1 none; expert 2 row 2; row 3 belongs to nobody.
    x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    w = jnp.array([[[1.0, 1.0]], [[100.0, 100.0]], [[2.0, -1.0]]])
    sizes = jnp.array([2, 0, 1])
    y = pallas_kernels.grouped_matmul(x, w, sizes, implementation=implementation)
    # 1 + 2 = 3; 3 + 4 = 7; 2 * 5 - 6 = 4; nothing.
    np.testing.assert_array_equal(y, [[3.0], [7.0], [4.0], [0.0]])


@pytest.mark.parametrize("implementation", FAST)
def test_every_pattern_of_empty_groups(implementation):
    rows = np.array([3, 1, 9, 2, 17, 4, 8, 5])  # 49 of 53 rows when nobody is empty
    filled = np.array(list(itertools.product((0, 1), repeat=E)))
    sizes = jnp.asarray(rows * filled, jnp.int32)
    x, w, dy = draw(0, 53, K), draw(1, E, N, K), draw(2, 53, N)

    def of_all_patterns(name):
        return jax.jit(functools.partial(jax.lax.map, lambda s: gradients(name)(x, w, s, dy)))(
            sizes
        )

    got, want = of_all_patterns(implementation), of_all_patterns("reference")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    y, dx, dw = map(np.asarray, got)
    assert not np.any(dw[filled == 0])
    tail = np.arange(53) >= (rows * filled).sum(axis=1, keepdims=True)
    assert not np.any(y[tail]) and not np.any(dx[tail])


@pytest.mark.parametrize("implementation", pallas_kernels.BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        (300, 0, 0, 0),  # more than one window of the largest height
        (0, 0, 0, 300),
        (257, 1, 0, 42),
        (1, 0, 0, 0),
        (0, 0, 0, 0),
        (64, 65, 63, 8),
    ],
)
def test_against_a_loop_by_hand(implementation, sizes):
    assert windows.heights(300, 4)[-1] < 300
    x, w = draw(3, 300, K), draw(4, 4, N, K)
    run = gradients(implementation)
    y, _, dw = run(x, w, jnp.array(sizes), draw(5, 300, N))
    np.testing.assert_allclose(y, by_hand(x, w, sizes), rtol=1e-4, atol=1e-4)
    # dw[e] = sum of dy[t] x[t]^T over the expert's rows
    dy, end = np.asarray(draw(5, 300, N)), np.cumsum(sizes)
    want = [dy[e - s : e].T @ np.asarray(x)[e - s : e] for s, e in zip(sizes, end, strict=True)]
    np.testing.assert_allclose(dw, want, rtol=1e-4, atol=1e-4)


def test_sizes_beyond_the_rows_are_cut_when_traced():
    x, w, dy = draw(6, 53, K), draw(7, E, N, K), draw(8, 53, N)
    sizes = jnp.array([30, 30, 5, 0, 0, 0, 0, 1])  # expert 1 gets rows 30..52, the others nothing
    cut = jnp.array([30, 23, 0, 0, 0, 0, 0, 0])
    for name in pallas_kernels.BACKENDS:
        run = gradients(name)
        for got, want in zip(run(x, w, sizes, dy), run(x, w, cut, dy), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("implementation", pallas_kernels.BACKENDS)
def test_no_rows(implementation):
    y, dx, dw = gradients(implementation)(
        jnp.zeros((0, K)), draw(9, E, N, K), jnp.zeros(E, jnp.int32), jnp.zeros((0, N))
    )
    assert y.shape == (0, N) and dx.shape == (0, K)
    assert not np.any(dw)


@pytest.mark.parametrize("implementation", pallas_kernels.BACKENDS)
def test_nan_beyond_the_groups_stays_there(implementation):
    x, w, dy = draw(10, 53, K), draw(11, E, N, K), draw(12, 53, N)
    sizes = jnp.array([0, 3, 0, 40, 1, 0, 2, 0])
    clean = gradients(implementation)(x.at[46:].set(0), w, sizes, dy.at[46:].set(0))
    dirty = gradients(implementation)(x.at[46:].set(jnp.nan), w, sizes, dy.at[46:].set(jnp.nan))
    for got, want in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(got, want)


def test_nan_inside_a_group_stays_in_its_row_and_expert():
    x, w, dy = draw(10, 53, K), draw(11, E, N, K), draw(12, 53, N)
    sizes = jnp.array([0, 3, 0, 40, 1, 0, 2, 0])
    y, dx, dw = gradients(None)(x.at[3].set(jnp.nan), w, sizes, dy)
    assert np.isnan(y[3]).all() and np.isfinite(np.delete(y, 3, 0)).all()
    assert np.isfinite(dx).all()
    assert np.isnan(dw[3]).all() and np.isfinite(np.delete(dw, 3, 0)).all()


@pytest.mark.parametrize("implementation", ["xla_windows", "reference"])
def test_bias_and_row_scale(implementation):
    sizes = (3, 0, 9)
    x, w, bias, scale = draw(13, 16, 4), draw(14, 3, N, 4), draw(15, 3, N), draw(16, 16)

    @jax.jit
    def product(x, w, bias, scale):
        return pallas_kernels.grouped_matmul(
            x, w, jnp.array(sizes), bias_EN=bias, row_scale_T=scale, implementation=implementation
        )

    want = by_hand(x, w, sizes, np.asarray(bias), np.asarray(scale))
    np.testing.assert_allclose(product(x, w, bias, scale), want, **CLOSE)
    # Bilinear in x and w, linear in scale and bias: finite differences of 1e-2 are accurate to rounding.
    check_grads(
        product, (x, w, bias, scale), order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2
    )
    none = jax.grad(lambda b: product(x, w, b, scale).sum())(bias)
    np.testing.assert_array_equal(none[1], 0)


@pytest.mark.parametrize("implementation", pallas_kernels.BACKENDS)
def test_bfloat16_accumulates_in_float32(implementation):
    x, w = draw(17, 53, K, dtype=jnp.bfloat16), draw(18, E, N, K, dtype=jnp.bfloat16)
    sizes = (9, 0, 20, 1, 0, 3, 3, 3)
    product = functools.partial(
        pallas_kernels.grouped_matmul,
        group_sizes_E=jnp.array(sizes),
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    # Operands are exact in float32, so a float32 result differs by rounding of the sum only.
    np.testing.assert_allclose(jax.jit(product)(x, w), by_hand(x, w, sizes), rtol=1e-5, atol=1e-5)
    y, dx, dw = gradients(implementation)(
        x, w, jnp.array(sizes), draw(19, 53, N, dtype=jnp.bfloat16)
    )
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16


PRECISIONS = [
    MatmulPrecision(x="nvfp4", w="nvfp4"),
    MatmulPrecision(w="mxfp4", w_rule="even"),
    MatmulPrecision(x="fp8_tensor", w="fp8_channel", x_scale="per_tensor"),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: f"{p.x}-{p.w}")
@pytest.mark.parametrize("implementation", ["xla_windows", "reference"])
def test_quantized_value_and_straight_through_gradient(implementation, precision):
    sizes = jnp.array([9, 0, 20, 1, 0, 3, 3, 3])
    x, w, dy = draw(20, 53, K), draw(21, E, N, K), draw(22, 53, N)
    x = x.at[39:].mul(1000)  # beyond the groups: must not move a per-tensor scale

    @jax.jit
    def run(x, w):
        def product(x, w):
            return pallas_kernels.quantized_grouped_matmul(
                x, w, sizes, precision, implementation=implementation
            )

        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy)

    y, dx, dw = run(x, w)
    x_value, w_value = (
        x[:39],
        formats.dequantize(formats.quantize(w, precision.w, rule=precision.w_rule)),
    )
    if precision.x:
        axes = 1 if precision.x_scale == "per_token" else 0
        q = formats.quantize(x_value, precision.x, rule=precision.x_rule, num_batch_axes=axes)
        x_value = formats.dequantize(q)
    np.testing.assert_allclose(y[:39], by_hand(x_value, w_value, sizes), **CLOSE)
    # Straight through: the gradients of the plain product at the rounded values.
    x_value = jnp.concatenate([x_value, x[39:]])
    _, want_dx, want_dw = gradients("reference")(x_value, w_value, sizes, dy)
    np.testing.assert_allclose(dx, want_dx, **CLOSE)
    np.testing.assert_allclose(dw, want_dw, **CLOSE)


@pytest.mark.parametrize("implementation", ["xla_windows", "reference"])
def test_packed_weights(implementation):
    sizes = jnp.array([9, 0, 20, 1, 0, 3, 3, 3])
    x, dy = draw(23, 53, K), draw(24, 53, N)
    packed = formats.quantize(draw(25, E, N, K), "nvfp4")

    @jax.jit
    def run(x, packed):
        def product(x):
            return pallas_kernels.quantized_grouped_matmul(
                x, packed, sizes, MatmulPrecision(), implementation=implementation
            )

        y, pull = jax.vjp(product, x)
        return y, *pull(dy)

    value = formats.dequantize(packed)
    y, dx = run(x, packed)
    want_y, want_dx, _ = gradients("reference")(x, value, sizes, dy)
    np.testing.assert_allclose(y, want_y, **CLOSE)
    np.testing.assert_allclose(dx, want_dx, **CLOSE)


def test_a_token_does_not_see_another_ones_scale():
    sizes, precision = jnp.array([20, 33]), MatmulPrecision(x="nvfp4", w="nvfp4")
    x, w = draw(26, 53, K), draw(27, 2, N, K)
    product = jax.jit(lambda x: pallas_kernels.quantized_grouped_matmul(x, w, sizes, precision))
    np.testing.assert_array_equal(product(x)[:40], product(x.at[40].mul(100))[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.zeros((4, K + 1))), r"same K, got \(4, 33\) and \(8, 5, 32\)"),
        (dict(x=jnp.zeros((2, 2, K))), r"x must be \(T, K\)"),
        (dict(x=jnp.zeros((4, K), jnp.int32)), "x must be float32, bfloat16 or float16, got int32"),
        (dict(w=jnp.zeros((0, N, K)), sizes=jnp.zeros(0, jnp.int32)), "at least one expert"),
        (dict(sizes=jnp.zeros(3, jnp.int32)), r"group_sizes_E must be .* = \(8,\), .* \(3,\)"),
        (dict(sizes=jnp.zeros(E)), "group sizes must be integers, got float32"),
        (dict(sizes=jnp.array([1, 2, 2, 0, 0, 0, 0, 0])), "sum to 5, but x has 4 rows"),
        (dict(sizes=jnp.array([-1, 2, 0, 0, 0, 0, 0, 0])), "must not be negative"),
        (dict(bias_EN=jnp.zeros((N, E))), r"bias_EN must be .* = \(8, 5\), got shape \(5, 8\)"),
        (dict(row_scale_T=jnp.zeros(3)), r"row_scale_T must be .* = \(4,\), got shape \(3,\)"),
        (dict(implementation="cutlass"), "unknown implementation 'cutlass'; allowed: auto, xla_w"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(change, message):
    arguments = dict(x=jnp.zeros((4, K)), w=jnp.zeros((E, N, K)), sizes=jnp.zeros(E, jnp.int32))
    arguments |= change
    x, w, sizes = (arguments.pop(name) for name in ("x", "w", "sizes"))
    with pytest.raises(ValueError, match=message):
        pallas_kernels.grouped_matmul(x, w, sizes, **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(x="fp3"), "unknown x 'fp3'; allowed: nvfp4, .*None"),
        (dict(dy="fp3"), "unknown dy 'fp3'; allowed: nvfp4"),
        (dict(x_scale="global"), "unknown x_scale 'global'; allowed: per_token, per_group, per_t"),
        (dict(w="mxfp4", w_rule="up"), "unknown w_rule 'up'; allowed: rceil, "),
        (dict(rotation=8), "unknown rotation 8; allowed: 16, 32, 64, 128"),
        (dict(rounding="up"), "unknown rounding 'up'; allowed: nearest, stochastic"),
        (dict(rounding="stochastic"), "dy must name a format"),
        (dict(hadamard=16), "dy must name a format"),
        (dict(dy="nvfp4"), "x needs one too"),
        (dict(x="nvfp4_2d", dy="nvfp4"), "x='nvfp4_2d' has no blocks along one axis"),
        (dict(x="nvfp4", dy="fp8_channel"), "dy='fp8_channel' has no blocks along one axis"),
    ],
)
def test_precision_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        MatmulPrecision(**fields)


def test_errors_of_quantized_products():
    packed = formats.quantize(draw(28, E, N, K), "nvfp4")
    x, sizes = draw(29, 4, K), jnp.zeros(E, jnp.int32)
    call = functools.partial(pallas_kernels.quantized_grouped_matmul, x, packed, sizes)
    with pytest.raises(ValueError, match="precision.w is 'mxfp4', but the weights are packed nv"):
        call(MatmulPrecision(w="mxfp4"))
    with pytest.raises(NotImplementedError, match="plain weights only"):
        call(MatmulPrecision(), implementation="ragged_dot")
    with pytest.raises(ValueError, match="needs a key"):
        call(MatmulPrecision(x="nvfp4", dy="nvfp4", rounding="stochastic"))
    with pytest.raises(ValueError, match="needs the calibrated maxima"):
        call(MatmulPrecision(x="nvfp4", x_scale="static"))
    with pytest.raises(ValueError, match="is for the NVFP4 formats, not mxfp4"):
        call(MatmulPrecision(x="mxfp4", x_scale="static"))


def test_the_schedule_covers_every_row_once_and_in_order():
    rng = np.random.default_rng(0)
    schedule = jax.jit(windows.schedule, static_argnums=(1, 2))
    for _ in range(50):
        sizes = rng.multinomial(rng.integers(0, 200), rng.dirichlet(np.full(E, 0.3)))
        plan = jax.tree.map(np.asarray, schedule(jnp.asarray(sizes), 200, 16))
        count, covered = plan.count, []
        assert count == np.sum(-(-sizes // 16))
        columns = (a[:count] for a in (plan.expert_W, plan.start_W, plan.rows_W))
        for e, s, r in zip(*columns, strict=True):
            assert 0 < r <= 16
            covered += [(row, e) for row in range(s, s + r)]
        assert covered == list(enumerate(np.repeat(np.arange(E), sizes)))


@pytest.mark.parametrize("rows", [1, 8, 9, 300, 8192, 32768, 10**6])
def test_heights_ascend_and_are_few(rows):
    heights = windows.heights(rows, 16)
    assert list(heights) == sorted(set(heights)) and 1 <= len(heights) <= 12
    assert heights[-1] <= max(8, 4 * rows)


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_46", "mxfp4", "mxfp8_e4m3", "fp8_block"])
@pytest.mark.parametrize("implementation", ["xla_windows", "reference"])
def test_quantized_products_are_within_a_millionth_of_float64(implementation, format):
    sizes, width = np.array([100, 0, 37, 63]), 256
    x, w = draw(30, 210, width), draw(31, 4, 48, width)
    packed = formats.quantize(w, format, num_batch_axes=1)
    activation = "fp8_row128" if format == "fp8_block" else format
    y = pallas_kernels.quantized_grouped_matmul(
        *(x, packed, jnp.asarray(sizes), MatmulPrecision(x=activation)),
        implementation=implementation,
    )
    x64, w64 = (
        np.asarray(formats.dequantize(q), np.float64)
        for q in (formats.quantize(x, activation, num_batch_axes=1), packed)
    )
    want = np.zeros((210, 48))
    want[:200] = np.stack([w64[e] @ x64[t] for t, e in enumerate(np.repeat(np.arange(4), sizes))])
    assert np.abs(y - want).max() / np.abs(want).max() < 1e-6
    assert np.linalg.norm(y - want) / np.linalg.norm(want) < 1e-6
