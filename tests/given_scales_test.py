"""Codes under given scales are those of quantize; hand-worked values; scales from chosen maxima; bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_spec import F32, MX_RULES, NVFP4, STACK, assert_same, padded

from pallas_kernels import formats

BYTE_FORMATS = [name for name, spec in formats.FORMATS.items() if not spec.float_scales]
VARIANTS = [(name, rule) for name in BYTE_FORMATS for rule in formats.FORMATS[name].rules]
# With blocks that are not finite, in every other matrix.
BROKEN = STACK.copy()
BROKEN[::2, 3, 5], BROKEN[1::4, 9, 40] = np.nan, -np.inf


def wide(scale, block):
    return jnp.repeat(scale, block, axis=-1)


def block_maxima(x, spec):
    """Float32 [..., N, B], shared by the rows of a tile."""
    amax = np.abs(x).reshape(*x.shape[:-1], -1, spec.block).max(-1)
    if spec.block_rows > 1:
        tiles = amax.reshape(len(x), -1, spec.block_rows, amax.shape[-1]).max(2)
        amax = tiles.repeat(spec.block_rows, axis=1)
    return amax


@pytest.mark.parametrize(("name", "rule"), VARIANTS)
@pytest.mark.parametrize("x", [STACK, BROKEN], ids=["finite", "broken"])
def test_under_its_own_scales_an_array_is_what_quantize_makes_of_it(name, rule, x):
    q = formats.quantize(x, name, rule=rule)
    assert_same(formats.quantize_with(jnp.asarray(x), q), q)


@pytest.mark.parametrize("name", BYTE_FORMATS)
def test_nearest_is_the_value_of_the_nearest_code_column_by_column(name):
    q = formats.quantize(STACK, name)
    other = jnp.asarray(STACK[::-1] * F32(0.7))  # under foreign scales: saturation and underflow
    want = formats.dequantize(formats.quantize_with(other, q))
    found = formats.nearest(other, wide(q.scales, formats.FORMATS[name].block), q.global_amax, name)
    assert_same(found, want)
    column = formats.nearest(
        other[:, :, 37], q.scales[:, :, 37 // formats.FORMATS[name].block], q.global_amax, name
    )
    assert_same(column, want[:, :, 37])


def test_by_hand_nvfp4():
    # amax 2688: the global scale is 1. Scale byte 0x40 is 2, so codes stand for 0, 1, 2, 3, 4, 6, 8, 12.
    like = formats.quantize(padded([2688.0]), "nvfp4")
    like = dataclasses.replace(like, scales=jnp.full((1, 1), 0x40, jnp.uint8))
    x = padded([1.1, -2.4, 5.0, 7.1, -100.0, 0.5, -1.5])
    q = formats.quantize_with(jnp.asarray(x), like)
    # 5 is halfway between 4 and 6: the even code (4 is code 4, 6 is code 5). 0.5 -> 0; -1.5 halfway 1, 2 -> 2.
    np.testing.assert_array_equal(
        formats.dequantize(q)[0, :7], np.array([1, -2, 4, 8, -12, 0, -2], F32)
    )
    np.testing.assert_array_equal(formats.unpack(q.codes)[0, :7], [1, 10, 4, 6, 15, 0, 10])
    assert float(q.global_amax) == 2688 and int(q.scales[0, 0]) == 0x40


def test_by_hand_mxfp4():
    # Byte 128 is 2^1: codes stand for 0, 1, 2, 3, 4, 6, 8, 12.
    like = formats.quantize(padded([6.0], length=32), "mxfp4")
    like = dataclasses.replace(like, scales=jnp.full((1, 1), 128, jnp.uint8))
    q = formats.quantize_with(jnp.asarray(padded([1.1, -2.4, 100.0], length=32)), like)
    np.testing.assert_array_equal(formats.dequantize(q)[0, :3], np.array([1, -2, 12], F32))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_nan_scale_stays_nan_and_a_zero_scale_zero(name):
    q = formats.quantize(jnp.ones((2, 64)), name)
    nan = 0x7F if name == "nvfp4" else 0xFF
    scales = q.scales.at[0, 1].set(nan).at[1, 0].set(0)
    found = formats.quantize_with(jnp.ones((2, 64)), dataclasses.replace(q, scales=scales))
    block = formats.FORMATS[name].block
    value = np.asarray(formats.dequantize(found))
    assert np.isnan(value[0, block : 2 * block]).all() and int(formats.count_nonfinite(found)) == 1
    if name == "nvfp4":
        assert (value[1, :block] == 0).all()
    assert (value[1, block:] == 1).all()


@pytest.mark.parametrize("name", list(NVFP4))
def test_scales_for_a_blocks_own_maxima_are_those_of_quantize(name):
    spec = formats.FORMATS[name]
    q = formats.quantize(STACK, name)
    amax = block_maxima(STACK, spec)
    own = np.asarray(formats.scales_for(jnp.asarray(amax), q.global_amax, name))
    if spec.rules == ("amax",):
        np.testing.assert_array_equal(own, q.scales)
        return
    # Four Over Six took the scale of the maximum, or of 1.5 times it (but for the rounding of that product).
    larger = np.minimum(amax, F32(2e38)) * F32(1.5)  # beyond, 1.5 times it is not finite
    near = np.asarray(formats.scales_for(jnp.asarray(larger), q.global_amax, name))
    near = np.where(amax > 2e38, q.scales, near)
    off = np.abs(near.astype(int) - np.asarray(q.scales, int))
    assert np.all((own == q.scales) | (off <= 1))
    assert np.mean((own == q.scales) | (off == 0)) > 0.99


@pytest.mark.parametrize("rule", MX_RULES)
def test_scales_for_mx_are_those_of_quantize(rule):
    q = formats.quantize(STACK, "mxfp4", rule=rule)
    amax = jnp.asarray(block_maxima(STACK, formats.FORMATS["mxfp4"]))
    assert_same(formats.scales_for(amax, None, "mxfp4", rule), q.scales)


def test_chosen_maxima_clip_or_leave_room_and_broken_ones_are_nan():
    global_amax = jnp.asarray(2688.0, jnp.float32)
    amax = jnp.asarray([[12.0, 24.0, jnp.nan, jnp.inf, 0.0]], jnp.float32)
    # 12 / 6 = 2 is byte 0x40, 24 / 6 = 4 is 0x48.
    np.testing.assert_array_equal(
        formats.scales_for(amax, global_amax, "nvfp4"), [[0x40, 0x48, 0x7F, 0x7F, 0]]
    )
    np.testing.assert_array_equal(
        formats.scales_for(amax, None, "mxfp4"), [[128, 129, 0xFF, 0xFF, 0]]
    )


@pytest.mark.parametrize("name", BYTE_FORMATS)
def test_what_is_not_finite_is_nan_in_its_whole_block_or_tile(name):
    like = formats.quantize(STACK, name)
    found = formats.dequantize(formats.quantize_with(jnp.asarray(BROKEN), like))
    want = formats.dequantize(formats.quantize(BROKEN, name))
    assert np.isnan(np.asarray(want)).sum() >= 48 * 16
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))


def test_vmap_gives_the_same():
    x = jnp.asarray(STACK)
    q = formats.quantize(x, "nvfp4")
    assert_same(jax.vmap(formats.quantize_with)(x, q), q)


def test_bad_input_is_one_clear_error():
    q = formats.quantize(jnp.ones((4, 32)), "nvfp4")
    with pytest.raises(ValueError, match=r"shape of like, \(4, 32\), got \(4, 16\)"):
        formats.quantize_with(jnp.ones((4, 16)), q)
    with pytest.raises(ValueError, match="x needs float32, .* got int32"):
        formats.quantize_with(jnp.ones((4, 32), jnp.int32), q)
    with pytest.raises(ValueError, match="'fp8_block' has no byte scales; allowed: nvfp4"):
        formats.quantize_with(jnp.ones((4, 32)), formats.quantize(jnp.ones((4, 32)), "fp8_block"))
    with pytest.raises(ValueError, match="unknown rule 'floor' for format nvfp4; allowed: amax"):
        formats.scales_for(jnp.ones((4, 2)), q.global_amax, "nvfp4", "floor")
    with pytest.raises(ValueError, match="global_amax must be an array for format nvfp4, got None"):
        formats.scales_for(jnp.ones((4, 2)), None, "nvfp4")
