"""Operands of weight gradients: the codes along the tokens, and the same codes in units of 256 tokens.

T rows, N and K columns, E experts, W tokens of a wide unit.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats
from pallas_kernels.grouped_matmul import MatmulPrecision, reference, transposed_operands

T, N, K, W = 75, 8, 16, 256
SIZES = np.array([20, 0, 33, 1, 16])  # 70 of 75 rows have an expert
X, DY = (jax.random.normal(jax.random.key(i), (T, n)) for i, n in ((0, K), (1, N)))
PRECISIONS = {
    "nvfp4": MatmulPrecision(x="nvfp4", dy="nvfp4", hadamard=16),
    "nvfp4 46": MatmulPrecision(x="nvfp4_46", dy="nvfp4", hadamard=32),
    "mxfp4": MatmulPrecision(x="mxfp4", dy="mxfp4", hadamard=16),
}


@functools.partial(jax.jit, static_argnums=(1, 3))
def operands(sizes, precision, key=None, unit=None):
    """Gradients and activations in the smallest units, and widened; their layouts' sizes."""
    layout = transposed_operands.units(
        sizes, T, unit or transposed_operands.smallest_unit(precision)
    )
    dy = transposed_operands.quantize(DY, layout, precision, precision.dy, None, key)
    x = transposed_operands.quantize(X, layout, precision, precision.x, precision.x_rule)
    wide = [transposed_operands.widen(q, layout.sizes_E, W) for q in (dy, x)]
    return (dy, x), layout.sizes_E, [q for q, _ in wide], wide[0][1]


def groups(rows, sizes):
    """The padded rows of each group."""
    return np.split(np.asarray(rows), np.cumsum(sizes))[:-1]


@pytest.mark.parametrize("name", PRECISIONS)
def test_wide_units_hold_the_same_values(name):
    small, small_sizes, wide, wide_sizes = operands(jnp.asarray(SIZES), PRECISIONS[name])
    assert list(wide_sizes) == [-(-size // W) * W for size in SIZES]
    for a, b in zip(small, wide, strict=True):
        assert b.shape[2] == W and b.global_amax is None or b.global_amax.shape == b.shape[:1]
        a, b = transposed_operands.values(a), transposed_operands.values(b)
        assert np.all(np.asarray(b)[int(sum(wide_sizes)) :] == 0)
        for part, same in zip(groups(a, small_sizes), groups(b, wide_sizes), strict=True):
            np.testing.assert_array_equal(part, same[: len(part)])
            assert np.all(same[len(part) :] == 0)


def test_quantizing_in_wide_units_makes_the_same_codes():
    # What a kernel that quantizes would do: nothing but draws depends on the unit.
    precision = PRECISIONS["nvfp4"]
    _, _, wide, _ = operands(jnp.asarray(SIZES), precision)
    at_once, _, _, _ = operands(jnp.asarray(SIZES), precision, None, W)
    for a, b in zip(wide, at_once, strict=True):
        count = min(a.shape[0], b.shape[0])
        assert count >= 4
        for leaf in ("codes", "scales", "global_amax"):
            np.testing.assert_array_equal(getattr(a, leaf)[:count], getattr(b, leaf)[:count])


def test_what_was_drawn_stays_when_units_widen():
    small, _, wide, wide_sizes = operands(
        jnp.asarray(SIZES), PRECISIONS["nvfp4"], jax.random.key(0)
    )
    nearest, small_sizes, _, _ = operands(jnp.asarray(SIZES), PRECISIONS["nvfp4"])
    drawn = transposed_operands.values(small[0])
    assert np.any(np.asarray(drawn) != np.asarray(transposed_operands.values(nearest[0])))
    b = transposed_operands.values(wide[0])
    for part, same in zip(groups(drawn, small_sizes), groups(b, wide_sizes), strict=True):
        np.testing.assert_array_equal(part, same[: len(part)])


@pytest.mark.parametrize("name", PRECISIONS)
def test_one_factor_per_expert_stands_for_both_global_scales(name):
    _, _, (dy, x), sizes = operands(jnp.asarray(SIZES), PRECISIONS[name])
    factor = transposed_operands.expert_scale(dy, x, sizes)
    want = reference.weight_gradient(
        transposed_operands.values(dy), transposed_operands.values(x), sizes
    )
    ones = [None if q.global_amax is None else jnp.ones_like(q.global_amax) for q in (dy, x)]
    unscaled = [
        formats.BlockScaled(q.codes, q.scales, one, q.format, q.rule)
        for q, one in zip((dy, x), ones, strict=True)
    ]
    by_one = transposed_operands.expert_scale(*unscaled, jnp.full(5, W, jnp.int32))
    got = reference.weight_gradient(*map(transposed_operands.values, unscaled), sizes)
    got = got * (factor / by_one)[:, None, None]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-5)
    assert factor[1] == 0 and np.all(np.asarray(factor)[[0, 2, 3, 4]] > 0)


def test_every_pattern_of_empty_groups_fits():
    precision = PRECISIONS["nvfp4"]
    rng = np.random.default_rng(0)
    for pattern in itertools.product([0, 1], repeat=5):
        sizes = rng.multinomial(T, np.ones(5) / 5) * pattern
        _, _, (dy, _), wide_sizes = operands(jnp.asarray(sizes), precision)
        assert sum(wide_sizes) <= dy.shape[0] * W <= T + 255 * 5 + 255
        values = np.asarray(transposed_operands.values(dy))
        for e, group in enumerate(groups(values, wide_sizes)):
            assert len(group) == -(-sizes[e] // W) * W and (not len(group) or np.any(group))


def test_no_rows_at_all():
    layout = transposed_operands.units(jnp.zeros(3, jnp.int32), 0, 16)
    precision = PRECISIONS["nvfp4"]
    q = transposed_operands.quantize(jnp.zeros((0, N)), layout, precision, "nvfp4")
    q, sizes = transposed_operands.widen(q, layout.sizes_E, W)
    assert q.shape == (1, N, W) and not np.any(transposed_operands.values(q))
    assert list(sizes) == [0, 0, 0]
    assert list(transposed_operands.expert_scale(q, q, sizes)) == [0, 0, 0]


@pytest.mark.parametrize("format, unit", [("fp8_row128", 256), ("nvfp4", 40)])
def test_what_cannot_be_widened_is_refused(format, unit):
    precision = MatmulPrecision(x="nvfp4", dy=format)
    layout = transposed_operands.units(jnp.asarray(SIZES), T, 128)
    q = transposed_operands.quantize(DY, layout, precision, format)
    with pytest.raises(ValueError, match=f"multiple of 128, got {format} and {unit}"):
        transposed_operands.widen(q, layout.sizes_E, unit)
