"""Products with quantized gradients: every operand is rounded as the precision says, checked against a loop in numpy.

The loop uses `formats` for the codes (checked against a numpy specification elsewhere) and float64 for the products.
T rows, K contraction axis, N output axis, E experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import formats
from pallas_kernels.grouped_matmul import MatmulPrecision, transposed_operands

K, N, E, T = 64, 32, 5, 75
SIZES = np.array([20, 0, 33, 1, 16])  # 70 of 75 rows have an expert
CLOSE = dict(rtol=2e-5, atol=2e-5)

NVFP4 = MatmulPrecision(x="nvfp4", w="nvfp4_2d", dy="nvfp4", hadamard=16)
PRECISIONS = {
    "nvfp4": NVFP4,
    "nvfp4 1x16 weights": MatmulPrecision(x="nvfp4", w="nvfp4", dy="nvfp4"),
    "nvfp4 scales per group": MatmulPrecision(
        x="nvfp4", w="nvfp4_2d", dy="nvfp4", x_scale="per_group", hadamard=32
    ),
    "mxfp4": MatmulPrecision(x="mxfp4", w="mxfp4", dy="mxfp8_e5m2", x_rule="even", hadamard=64),
    "fp8_block": MatmulPrecision(x="fp8_row128", w="fp8_block", dy="fp8_row128"),
}


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, W, DY = draw(0, T, K), draw(1, E, N, K), draw(2, T, N)


@functools.cache
def product(implementation, precision):
    @jax.jit
    def run(x, w, dy, key):
        def forward(x, w):
            return pallas_kernels.quantized_grouped_matmul(
                x, w, jnp.asarray(SIZES), precision, implementation=implementation, key=key
            )

        y, pull = jax.vjp(forward, x, w)
        return y, *pull(dy)

    return lambda x, w, dy, key=None: [np.asarray(a, np.float64) for a in run(x, w, dy, key)]


def rounded(x, format, rule=None, **options):
    q = formats.quantize(jnp.asarray(x, jnp.float32), format, rule=rule, **options)
    return np.asarray(formats.dequantize(q), np.float64)


def of_group(x, format, rule, scale):
    """One group's rows rounded along their last axis."""
    if scale == "per_token" or formats.FORMATS[format].scale != "e4m3":
        return rounded(x, format, rule, num_batch_axes=1)
    return rounded(x, format, rule, num_batch_axes=0)


def along_tokens(a, precision, format, rule):
    """One group's rows (R, C) padded with zeros, transformed, rounded along the tokens: (C, R')."""
    blocks = [formats.FORMATS[f].block for f in (precision.x, precision.dy)]
    unit = max(*blocks, precision.hadamard or 1)
    a = np.pad(np.asarray(a), ((0, -a.shape[0] % unit), (0, 0))).T
    if precision.hadamard:
        signs = jnp.asarray(transposed_operands.token_signs(precision.hadamard))
        a = formats.block_hadamard(jnp.asarray(a), precision.hadamard, signs=signs)
    return rounded(a, format, rule, num_batch_axes=0)


def by_hand(x, w, dy, p):
    """y, dx, dw with every operand of every product rounded along its own contraction axis."""
    x, w, dy = (np.asarray(a, np.float32) for a in (x, w, dy))
    y, dx, dw = np.zeros((T, N)), np.zeros((T, K)), np.zeros((E, N, K))
    start = 0
    for e, size in enumerate(SIZES):
        rows = slice(start, start + size)
        start += size
        if not size:
            continue
        w_nk = rounded(w[e], p.w, p.w_rule)
        y[rows] = of_group(x[rows], p.x, p.x_rule, p.x_scale) @ w_nk.T
        two_d = formats.FORMATS[p.w].block_rows > 1
        w_back = w_nk if two_d else rounded(w[e].T, p.w, p.w_rule).T
        dx[rows] = of_group(dy[rows], p.dy, None, "per_group") @ w_back
        dy_t = along_tokens(dy[rows], p, p.dy, None)
        dw[e] = dy_t @ along_tokens(x[rows], p, p.x, p.x_rule).T
    return y, dx, dw


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(
    "implementation",
    [
        "xla_windows",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("reference", "ragged_dot")),
    ],
)
def test_all_three_products_have_quantized_operands(implementation, name):
    got = product(implementation, PRECISIONS[name])(X, W, DY)
    for a, b in zip(got, by_hand(X, W, DY, PRECISIONS[name]), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    assert np.all(got[2][1] == 0)  # the expert without rows
    assert np.all(got[1][70:] == 0)  # the rows without an expert


def test_gradients_differ_from_straight_through_ones():
    straight = product("xla_windows", MatmulPrecision(x="nvfp4", w="nvfp4_2d"))(X, W, DY)
    quantized = product("xla_windows", NVFP4)(X, W, DY)
    np.testing.assert_array_equal(straight[0], quantized[0])  # a loss would not tell
    for a, b in zip(straight[1:], quantized[1:], strict=True):
        assert 0.02 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.3


def test_no_block_holds_rows_of_two_experts():
    # A row of expert 2 grows: nothing of the other experts moves, although blocks of 16 rows would straddle.
    big = product("xla_windows", NVFP4)(X.at[25].mul(1e4), W, DY.at[25].mul(1e4))
    plain = product("xla_windows", NVFP4)(X, W, DY)
    others = np.arange(E) != 2
    np.testing.assert_array_equal(big[2][others], plain[2][others])
    rows = np.r_[:20, 53:T]
    np.testing.assert_array_equal(big[1][rows], plain[1][rows])


def test_rows_of_nobody_do_not_count():
    changed = product("xla_windows", NVFP4)(X.at[72].set(jnp.nan), W, DY.at[71].set(jnp.inf))
    for a, b in zip(changed, product("xla_windows", NVFP4)(X, W, DY), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_nonfinite_gradient_stays_visible():
    _, dx, dw = product("xla_windows", NVFP4)(X, W, DY.at[3, 5].set(jnp.nan))
    assert np.isnan(dx[3]).any() and np.isnan(dw[0]).any() and np.isfinite(dw[2]).all()


def test_stochastic_rounding_is_of_gradients_only_and_unbiased():
    # MXFP4 scales never clip; NVFP4's are rounded, so that a block's largest value may lie above the last code.
    precision = MatmulPrecision(
        x="nvfp4", w="nvfp4_2d", dy="mxfp4", hadamard=16, rounding="stochastic"
    )
    run = product("xla_windows", precision)
    draws = [run(X, W, DY, jax.random.key(i)) for i in range(200)]
    y, dx, dw = (np.stack([d[i] for d in draws]) for i in range(3))
    assert np.ptp(y, axis=0).max() == 0
    # The mean over draws is the product with the unrounded gradient; x and w stay rounded to nearest.
    straight = MatmulPrecision(x="nvfp4", w="nvfp4_2d")
    want_dx = product("xla_windows", straight)(X, W, DY)[1]
    want_dw = np.zeros_like(dw[0])
    start = 0
    for e, size in enumerate(SIZES):
        if size:
            rows = slice(start, start + size)
            x_t = along_tokens(X[rows], precision, "nvfp4", None)
            dy = np.pad(np.asarray(DY[rows]), ((0, -size % 32), (0, 0))).T
            signs = jnp.asarray(transposed_operands.token_signs(16))
            dy = np.asarray(formats.block_hadamard(jnp.asarray(dy), 16, signs=signs), np.float64)
            want_dw[e] = dy @ x_t.T
        start += size
    for got, want in ((dx, want_dx), (dw, want_dw)):
        error = np.std(got, axis=0) / np.sqrt(len(got)) + 1e-5
        z = (got.mean(axis=0) - want) / error
        assert np.abs(z).max() < 6 and abs(np.std(z[np.abs(want) > 0]) - 1) < 0.15
        assert np.std(got, axis=0).mean() > 0


def test_the_two_backward_products_draw_apart():
    # With T = N = K, one expert and a symmetric problem both products would round the same matrix alike.
    a = draw(5, 16, 16)
    precision = MatmulPrecision(x="nvfp4", w="nvfp4_2d", dy="nvfp4", rounding="stochastic")
    identity = jnp.eye(16)

    def forward(x, w):
        return pallas_kernels.quantized_matmul(x, w, precision, key=jax.random.key(0))

    _, pull = jax.vjp(forward, identity, identity)
    symmetric = a + a.T
    dx, dw = pull(symmetric)
    assert np.abs(np.asarray(dx) - symmetric).max() < 2  # dx = dy, dw = dy^T, each rounded
    assert np.any(np.asarray(dx) != np.asarray(dw).T)


def test_a_dense_product_is_a_group_of_one():
    x, w, dy = X[:48], W[0], DY[:48]
    dense, pull = jax.vjp(lambda x, w: pallas_kernels.quantized_matmul(x, w, NVFP4), x, w)
    sizes = jnp.array([48])
    grouped, grouped_pull = jax.vjp(
        lambda x, w: pallas_kernels.quantized_grouped_matmul(x, w[None], sizes, NVFP4), x, w
    )
    for a, b in zip((dense, *pull(dy)), (grouped, *grouped_pull(dy)), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("gradients", [False, True])
def test_rotation_cancels_and_its_gradient_is_that_of_the_input(gradients):
    fields = dict(dy="fp8_row128") if gradients else {}
    precision = MatmulPrecision(x="fp8_row128", w="fp8_block", rotation=32, **fields)
    y, dx, dw = product("xla_windows", precision)(X, W, DY)
    plain = product("xla_windows", MatmulPrecision())(X, W, DY)
    for a, b in zip((y, dx, dw), plain, strict=True):
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)
    # And it is there: the rounding is another one than without.
    unrotated = MatmulPrecision(x="fp8_row128", w="fp8_block", **fields)
    assert np.any(y != product("xla_windows", unrotated)(X, W, DY)[0])


def test_static_scales_are_the_callers():
    amax = jnp.array([1.0, 1.0, 2.0, 3.0, 4.0])
    precision = MatmulPrecision(x="nvfp4", w="nvfp4", x_scale="static")
    y = pallas_kernels.quantized_grouped_matmul(X, W, jnp.asarray(SIZES), precision, x_amax_E=amax)
    rows, start = np.zeros((T, K)), 0
    for size, a in zip(SIZES, amax, strict=True):
        x = X[start : start + size]
        rows[start : start + size] = rounded(x, "nvfp4", num_batch_axes=0, global_amax=a)
        start += size
    w = np.stack([rounded(W[e], "nvfp4") for e in range(E)])
    want = np.stack([w[e] @ rows[t] for t, e in enumerate(np.repeat(np.arange(E), SIZES))])
    np.testing.assert_allclose(np.asarray(y)[:70], want, **CLOSE)


def test_products_of_the_jaxpr_take_rounded_operands():
    # What enters the backend's products must have come through a format: the codes' dtype, uint8, is on the way.
    def loss(x, w):
        y = pallas_kernels.quantized_grouped_matmul(
            x, w, jnp.asarray(SIZES), NVFP4, implementation="reference"
        )
        return jnp.sum(y * DY)

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(X, W))
    # x and w for y; dy for dx (w's 2D codes serve again); dy and x for dw: five quantizations, three products of E.
    assert text.count("name=_quantize ") + text.count("name=_quantize\n") == 5
    assert text.count("dot_general") >= 3


def test_expert_mlp_trains_with_both_layers_quantized():
    gate_up, down = draw(6, E, 2 * 32, K), draw(7, E, K, 32)
    precision = MatmulPrecision(
        x="nvfp4", w="nvfp4_2d", dy="nvfp4", hadamard=16, rounding="stochastic"
    )

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def run(x, gate_up, down, key, implementation, precision):
        def layer(x, gate_up, down):
            return pallas_kernels.expert_mlp(
                *(x, gate_up, down, jnp.asarray(SIZES)),
                precision=precision,
                key=key,
                implementation=implementation,
            )

        y, pull = jax.vjp(layer, x, gate_up, down)
        return y, *pull(jnp.ones_like(y))

    args = (X, gate_up, down, jax.random.key(3))
    got = run(*args, "xla_windows", precision)
    for a, b in zip(got, run(*args, "reference", precision), strict=True):
        # A sum that rounds differently may draw another neighbour, rarely.
        assert np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b)
    plain = run(*args, "xla_windows", MatmulPrecision())
    for a, b in zip(got, plain, strict=True):
        assert 1e-3 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.6
