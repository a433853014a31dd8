"""Stochastic rounding: unbiased, on the two neighbours only, repeatable, and with the scales of rounding to nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_spec import DTYPES, F32, STACK, assert_same, cast, logical_codes, values

from pallas_kernels import formats
from pallas_kernels.formats import elements

DRAWS = 100_000
ELEMENTS = {"e2m1": elements.E2M1, "e4m3": elements.E4M3, "e5m2": elements.E5M2}
KEY = jax.random.key(3)


def neighbours(x, name):
    """The largest code's value <= x and the smallest >= x, saturating, in float64."""
    code = np.arange(2 ** ELEMENTS[name].bits, dtype=np.uint8)
    grid = np.unique(code.view(DTYPES[name]).astype(np.float64))
    grid = grid[np.isfinite(grid)]
    x = np.clip(x.astype(np.float64), grid[0], grid[-1])
    below = grid[np.searchsorted(grid, x, side="right") - 1]
    return below, grid[np.searchsorted(grid, x, side="left")]


def assert_unbiased(drawn, x, below, above):
    """Asserts that the mean over the first axis is within 4 standard errors of x, a point between two values."""
    assert ((drawn == below) | (drawn == above)).all()
    gap = above - below
    up = np.where(gap > 0, (x - below) / np.where(gap > 0, gap, 1), 0)
    error = np.abs(drawn.mean(0) - x) / np.where(gap > 0, gap, 1)
    # The exact standard error of a coin, and 2^-17 for the resolution of the random bits.
    assert (error <= 4 * np.sqrt(up * (1 - up) / len(drawn)) + 2.0**-17).all()


def draws(x, name):
    """DRAWS stochastic roundings of each x, as values: [DRAWS, len(x)]."""

    @jax.jit
    def draw(x, key):
        random = elements.random_bits(key, (DRAWS, len(x)))
        wide = jnp.broadcast_to(x, random.shape)
        return elements.encode(wide, ELEMENTS[name], random=random)

    return values(np.asarray(draw(x, KEY)), name).astype(np.float64)


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_round_without_bias_to_the_two_neighbours(name):
    # Within binades, across one, below the smallest number, near zero and near the largest number.
    smallest = float(neighbours(np.array([1e-9]), name)[1][0])
    largest = ELEMENTS[name].max_value
    x = [0.3, 1.1, -1.9, 2.2, -5.7, 3.99, 0.4 * smallest, -0.01 * smallest, 1.7 * smallest]
    x = np.array([*x, 0.97 * largest, 0.0, 1.5, largest, smallest], F32)
    below, above = neighbours(x, name)
    assert_unbiased(draws(x, name), x.astype(np.float64), below, above)


def test_what_is_too_large_saturates_and_what_is_tiny_stays_rare():
    x = np.array([6.1, -1e30, np.inf, 2.0**-18, 1e-40], F32)
    drawn = draws(x, "e2m1")
    assert (drawn[:, 0] == 6).all() and (drawn[:, 1] == -6).all() and (drawn[:, 2] == 6).all()
    # 2^-18 of 0.5 is 2^-17 of the gap: 1e5 draws see it about once, if at all.
    assert (drawn[:, 3] > 0).sum() < 10
    assert (drawn[:, 4] == 0).all()


def test_random_bits_are_uniform_and_independent():
    random = np.asarray(elements.random_bits(KEY, (1000, 101)))
    assert random.shape == (1000, 101) and random.min() >= 0 and random.max() < 2**16
    # 101000 numbers: the mean's standard error is 2^16 / sqrt(12 * 101000) = 59.5.
    assert abs(random.mean() - (2**16 - 1) / 2) < 4 * 59.5
    # Both halves of a word, element i and i + 51: the correlation's standard error is 1 / sqrt(50000) = 0.0045.
    assert abs(np.corrcoef(random[:, :50].ravel(), random[:, 51:].ravel())[0, 1]) < 4 * 0.0045


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("nvfp4", None),
        ("nvfp4_2d", None),
        ("nvfp4_46", "mae"),
        ("mxfp4", "rceil"),
        ("mxfp4", "floor"),
        ("mxfp8_e4m3", None),
        ("mxfp8_e5m2", None),
        ("fp8_block", None),
        ("fp8_tensor", None),
        ("int8_channel", None),
        ("int4_group", None),
    ],
)
def test_quantize_is_unbiased_within_the_clip_range(name, rule):
    # Equal rows, so that every row is another draw under the same scales.
    x = np.random.default_rng(11).standard_normal(32).astype(F32)
    rows = jnp.broadcast_to(x, (DRAWS, 32))
    nearest = formats.quantize(rows, name, rule=rule)
    q = formats.quantize(rows, name, rule=rule, key=KEY)
    assert_same((q.scales, q.global_amax), (nearest.scales, nearest.global_amax))
    value = np.asarray(formats.dequantize(q))
    low, high = value.min(0).astype(np.float64), value.max(0).astype(np.float64)
    codes = logical_codes(q).astype(int)
    sign = 2 ** (formats.FORMATS[name].element.bits - 1)
    if name.startswith("int"):
        codes = (codes ^ sign) - sign
        assert (codes.max(0) - codes.min(0) <= 1).all()
    else:
        assert ((codes & (sign - 1)).max(0) - (codes & (sign - 1)).min(0) <= 1).all()
    # A value that is clipped, or within 2^-15 of a code, does not move and stays at its nearest code.
    moves = low < high
    assert moves.sum() >= 28
    near = np.asarray(formats.dequantize(nearest))[0]
    np.testing.assert_array_equal(value[0, ~moves], near[~moves])
    assert ((low <= x) & (x <= high))[moves].all()
    assert_unbiased(value[:, moves].astype(np.float64), x[moves], low[moves], high[moves])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_value_that_has_a_code_keeps_it(name):
    once = formats.dequantize(formats.quantize(STACK[:4], name))
    if name in ("fp8_channel", "fp8_tensor") or name.startswith("nvfp4"):
        # Requantizing moves by a rounding of the scale: take values whose scales are powers of two.
        once = np.zeros((1, 16, 64), F32)
        once[..., :5] = np.array([6, 4, -3, 0.5, 1], F32) * F32(formats.FORMATS[name].scale_bound)
        once[..., 0] = once[..., 0] if name.startswith("nvfp4") else 448
        once[..., 1:5] = once[..., 1:5] if name.startswith("nvfp4") else [208, -3, 0.5, 2.0**-9]
    want = formats.quantize(once, name)
    assert_same(formats.quantize(once, name, key=KEY), want)


@pytest.mark.parametrize("name", ["nvfp4_46", "mxfp8_e4m3", "int4_group"])
def test_one_key_gives_one_result_however_it_is_run(name):
    want = formats.quantize(STACK, name, key=KEY)
    with jax.disable_jit():
        assert_same(formats.quantize(STACK, name, key=KEY), want)
    assert_same(jax.jit(lambda x, k: formats.quantize(x, name, key=k))(STACK, KEY), want)
    raw = jax.random.key_data(KEY)
    assert_same(formats.quantize(STACK, name, key=raw), want)
    keys = jax.random.split(KEY, len(STACK))
    mapped = jax.vmap(lambda x, k: formats.quantize(x, name, key=k))(STACK, keys)
    assert_same(
        jax.tree.map(lambda leaf: leaf[3], mapped), formats.quantize(STACK[3], name, key=keys[3])
    )
    other = formats.quantize(STACK, name, key=jax.random.key(4))
    assert not np.array_equal(other.codes, want.codes)
    assert_same(other.scales, want.scales)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_not_finite_and_zero_blocks_are_as_without_a_key(name):
    x = STACK[:3].copy()
    x[0, 3, 7], x[1, 5, 40] = np.nan, np.inf
    x[2] = 0
    q, want = formats.quantize(x, name, key=KEY), formats.quantize(x, name)
    assert_same(q.scales, want.scales)
    value = np.asarray(formats.dequantize(q))
    np.testing.assert_array_equal(np.isnan(value), np.isnan(formats.dequantize(want)))
    assert not logical_codes(q)[np.isnan(value)].any() and not value[2].any()


def test_odd_lengths_have_random_bits_too():
    x = np.random.default_rng(12).standard_normal((3, 37)).astype(F32)
    q = formats.quantize(x, "fp8_row128", key=KEY)
    scaled = x / np.asarray(q.scales)
    below, above = neighbours(scaled, "e4m3")
    found = values(logical_codes(q), "e4m3")
    assert ((found == below) | (found == above)).all()
    assert not np.array_equal(logical_codes(q), cast(scaled, "e4m3"))
