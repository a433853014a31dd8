"""Formats by hand: small numbers with the arithmetic in comments."""

import jax.numpy as jnp
import numpy as np
import pytest
from formats_spec import F32, LARGEST, MX, MX_RULES, STACK, padded

from pallas_kernels import formats
from pallas_kernels.formats import elements

ELEMENTS = {"e2m1": elements.E2M1, "e4m3": elements.E4M3, "e5m2": elements.E5M2}


def test_nvfp4_by_hand():
    # amax = 2688 = 6 * 448, so encode = decode = 1 and a scale is e4m3(block amax / 6).
    # Row 0: 2688 / 6 = 448 = 1.75 * 2^8 -> 0 1111 110 = 0x7e.  2688 / 448 = 6 -> 7;  1344 / 448 = 3 -> 5.
    # Row 1: 10 / 6 = 1.667, E4M3 has 1.625 and 1.75 -> 1.625 = 0 0111 101 = 0x3d.
    #   10 / 1.625 = 6.15 -> 6 (7);  5 / 1.625 = 3.08 -> 3 (5);  2 / 1.625 = 1.23 -> 1 (2);
    #   -1 / 1.625 = -0.615 -> -0.5 (8 + 1);  0.4 / 1.625 = 0.246 -> 0.
    x = padded([2688, 1344], [10, 5, 2, -1, 0.4], [0])
    q = formats.quantize(x, "nvfp4")
    assert q.global_amax == 2688
    np.testing.assert_array_equal(q.scales, [[0x7E], [0x3D], [0]])
    # Low nibble first: 7 + 16 * 5 = 0x57;  2 + 16 * 9 = 0x92.
    np.testing.assert_array_equal(q.codes[:, :3], [[0x57, 0, 0], [0x57, 0x92, 0], [0, 0, 0]])
    want = padded([2688, 1344], [6 * 1.625, 3 * 1.625, 1.625, -0.5 * 1.625], [0])
    np.testing.assert_array_equal(formats.dequantize(q), want)


def test_four_over_six_by_hand():
    # amax = 1536 = 6 * 256, so encode = decode = 1.
    # Row 0: 6: scale 256, 4: scale 384: both represent 1536 without error, the tie keeps 6: code 7, 256 = 0x78.
    # Row 1: 6: scale e4m3(1.667) = 1.625: 10 -> 6 * 1.625 = 9.75 (error 0.0625), 7.5 / 1.625 = 4.6 -> 4 * 1.625 = 6.5
    #   (error 1).  4: scale 1.5 * 1.667 = 2.5 = 0 1000 010 = 0x42: 10 = 4 * 2.5 and 7.5 = 3 * 2.5, no error.
    #   So 4: codes 6 and 5.
    # Row 2: 9.75 = 6 * 1.625, 0.8125 = 0.5 * 1.625: 6 has no error;  4: scale e4m3(2.4375) = 2.5 (tie to even of 2.25
    #   and 2.5 is at 2.375, above): 9.75 -> 4 * 2.5 = 10. So 6: scale 0x3d, codes 7 and 1.
    x = padded([1536], [10, 7.5], [9.75, 0.8125])
    q = formats.quantize(x, "nvfp4_46")
    np.testing.assert_array_equal(q.scales, [[0x78], [0x42], [0x3D]])
    np.testing.assert_array_equal(q.codes[:, 0], [7, 0x56, 0x17])
    np.testing.assert_array_equal(formats.dequantize(q), x)


def test_four_over_six_by_mae_and_by_mse_may_differ():
    # amax = 1536, so encode = decode = 1. Row 1: 6, 4.5 and eight times 2.2.
    #   6: scale 6 / 6 = 1: 6; 4.5 -> 4 (error .5); 2.2 -> 2 (.2).        Sum 2.1, of squares .25 + 8 * .04 = .57.
    #   4: scale 1.5: 6 = 4 * 1.5; 4.5 = 3 * 1.5; 2.2 / 1.5 = 1.47 -> 1.5 * 1.5 = 2.25 (.05).  Sum .4, squares .02.
    # Row 2: 6, 2.0 and 4.0 without error at 6; at 4: 2 / 1.5 = 1.33 -> 2.25, 4 / 1.5 = 2.67 -> 4.5. So 6.
    # Row 3: 6, then 5.0 once and 0.75 four times.  6: 5 -> 4 (tie to even: 1), .75 -> 1 (tie to even: .25 each).
    #   Sum 2, squares 1.25.  4: 5 / 1.5 = 3.33 -> 4.5 (.5); .75 = .5 * 1.5 without error. Sum .5, squares .25: 4.
    # Row 4: 6, 5.2 once and 3.0 four times.  6: 5.2 -> 6 (.8), 3 (0).  Sum .8, squares .64.
    #   4: 5.2 / 1.5 = 3.47 -> 4.5 (.7), 3 = 2 * 1.5 (0).  Sum .7, squares .49: 4 by both.
    # Row 5: 6, 5.2 once and 0.6 eight times.  6: .8 and .6 -> .5 (.1): sum 1.6, squares .64 + .08 = .72.
    #   4: .7 and .6 / 1.5 = .4 -> .75 (.15): sum 1.9, squares .49 + .18 = .67.  So 6 by mae, 4 by mse.
    rows = [
        [1536],
        [6, 4.5] + 8 * [2.2],
        [6, 2, 4],
        [6, 5] + 4 * [0.75],
        [6, 5.2] + 4 * [3],
        [6, 5.2] + 8 * [0.6],
    ]
    x = padded(*rows)
    six, four = 0x38, 0x3C  # 1 and 1.5 in E4M3
    for name, rule, last in (("nvfp4_46", "mse", four), ("nvfp4_46", "mae", six)):
        q = formats.quantize(x, name, rule=rule)
        np.testing.assert_array_equal(q.scales[1:, 0], [four, six, four, four, last])
        assert q.rule == rule


def test_four_over_six_in_tiles_decides_once_for_a_tile():
    # One row that alone prefers 4 (1, 4.5) and one that prefers 6 (4, 2): the sums over the tile decide, .5 + 0 at 6
    # against 0 + 2 * .5 + 2 * .25 at 4.
    x = np.zeros((16, 16), F32)
    x[0, 0] = 1536 * 2.0**-8
    x[1, :2] = 6, 4.5
    x[2, :4] = 4, 4, 2, 2
    large = np.zeros((16, 16), F32)
    large[0, 0] = 1536
    x[0, 0] = 6
    q = formats.quantize(np.concatenate([large, x]), "nvfp4_46_2d", rule="mae")
    assert (np.asarray(q.scales[16:]) == 0x38).all()
    x[2] = 0
    q = formats.quantize(np.concatenate([large, x]), "nvfp4_46_2d", rule="mae")
    assert (np.asarray(q.scales[16:]) == 0x3C).all()


def test_fp8_tiles_by_hand():
    # DeepSeek's tiles: a scale is its tile's amax / 448, and says how to decode. 130 x 200 make 2 x 2 tiles.
    x = np.zeros((130, 200), F32)
    x[0, 0], x[127, 127], x[0, 128], x[129, 199] = 448, 1, -896, 44.8
    q = formats.quantize(x, "fp8_block")
    np.testing.assert_array_equal(q.scales, np.array([[1, 2], [0, F32(44.8) / F32(448)]], F32))
    # 448 = 1.75 * 2^8 -> 0x7e; 1 = 2^0 -> field 7: 0x38; -896 / 2 = -448 -> 0xfe.
    assert [int(q.codes[i]) for i in ((0, 0), (127, 127), (0, 128), (129, 199))] == [
        0x7E,
        0x38,
        0xFE,
        0x7E,
    ]
    assert q.block_shape == (128, 128)
    q = formats.quantize(x, "fp8_row128")
    assert (q.scales.shape, q.block_shape) == ((130, 2), (1, 128))
    np.testing.assert_array_equal(q.scales[127], np.array([F32(1) / F32(448), 0], F32))
    np.testing.assert_array_equal(formats.dequantize(q)[0, [0, 128]], [448, -896])


def test_integers_by_hand():
    # int8: 127 / 127 = 1, so codes are the values; 2.5 ties to 2, -0.5 to 0, -3 = 253.
    q = formats.quantize(padded([127, 2.5, -0.5, -3]), "int8_channel")
    np.testing.assert_array_equal(q.codes[0, :4], [127, 2, 0, 253])
    np.testing.assert_array_equal(q.scales, [1])
    # int4: 10 / 7 = 1.42857 is 1.4296875 in bfloat16 (183 / 128). 10 / that = 6.99 -> 7; 5 -> 3.497 -> 3;
    # -10 -> -7 = 9; -1 -> -0.6995 -> -1 = 15.  Low nibble first: 0x37, 0xf9.
    q = formats.quantize(padded([10, 5, -10, -1], length=32), "int4_group")
    np.testing.assert_array_equal(q.codes[0, :2], [0x37, 0xF9])
    assert q.scales.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        formats.dequantize(q)[0, :4], np.array([7, 3, -7, -1], F32) * F32(183 / 128)
    )


E8M0_BY_HAND = {
    # E2M1: emax 2, so floor is floor(log2 a) - 2; rceil goes up above 6, even at 7 (1.75 rounds to 2).
    "e2m1": {
        "amax": [4.0, 6.0, 6.5, 7.0, 8.0, 0.75],
        "floor": [0, 0, 0, 0, 1, -3],
        "rceil": [0, 0, 1, 1, 1, -3],
        "even": [0, 0, 0, 1, 1, -3],
        "ceil": [0, 1, 1, 1, 1, -2],
    },
    # E4M3: emax 8; rceil goes up above 448 = 1.75 * 256, even at 1.9375 * 256 = 496.
    "e4m3": {
        "amax": [256.0, 448.0, 480.0, 496.0],
        "floor": [0, 0, 0, 0],
        "rceil": [0, 0, 1, 1],
        "even": [0, 0, 0, 1],
        "ceil": [0, 1, 1, 1],
    },
    # E5M2: emax 15; rceil goes up above 57344 = 1.75 * 32768, even at 1.875 * 32768 = 61440.
    "e5m2": {
        "amax": [57344.0, 61439.0, 61440.0],
        "floor": [0, 0, 0],
        "rceil": [0, 1, 1],
        "even": [0, 0, 1],
        "ceil": [1, 1, 1],
    },
}


@pytest.mark.parametrize("name", E8M0_BY_HAND)
def test_e8m0_rules_by_hand(name):
    table = E8M0_BY_HAND[name]
    for rule in MX_RULES:
        found = elements.e8m0_exponent(np.array(table["amax"], F32), ELEMENTS[name], rule)
        np.testing.assert_array_equal(found, table[rule], err_msg=rule)


def test_default_rule_is_rceil_and_never_clips():
    for name, element in MX.items():
        q = formats.quantize(STACK, name)
        assert q.rule == "rceil"
        block_amax = np.abs(STACK.astype(np.float64)).reshape(*STACK.shape[:-1], -1, 32).max(-1)
        room = LARGEST[element] * np.ldexp(1.0, np.asarray(q.scales).astype(int) - 127)
        assert (block_amax <= room).all()


def test_smallest_e8m0_scale_is_not_flushed():
    # Byte 0 is 2^-127, a float32 subnormal; 6 * 2^-127 is not.
    one_block = jnp.full((1, 16), 0x77, jnp.uint8)  # 32 codes of 6
    for scale, exponent in ((0, -127), (1, -126), (127, 0), (251, 124)):
        scales = jnp.full((1, 1), scale, jnp.uint8)
        q = formats.BlockScaled(one_block, scales, None, "mxfp4", "rceil")
        assert (np.asarray(formats.dequantize(q)) == 6 * 2.0**exponent).all()


def test_a_given_global_amax_by_hand():
    # Global amax 5376 = 2 * 2688: encode = 1/2, so 10 / 6 / 2 = 0.833 -> e4m3 0.8125 = 0 0110 101 = 0x35, step 1.625:
    # 10 / 1.625 = 6.15 -> 6 (7). A block at twice the global amax wants the scale 896 and gets 448 = 0x7e, step 896:
    # 10752 / 896 = 12 saturates at 6 (7).
    x = padded([10, 5], [10752])
    amax = jnp.full((), 5376, jnp.float32)
    q = formats.quantize(x, "nvfp4", global_amax=amax)
    assert q.global_amax == 5376
    np.testing.assert_array_equal(q.scales, [[0x35], [0x7E]])
    np.testing.assert_array_equal(q.codes[:, 0], [0x57, 7])
    np.testing.assert_array_equal(formats.dequantize(q)[:, 0], [6 * 1.625, 6 * 896])


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_46", "nvfp4_2d", "nvfp4_46_2d"])
def test_a_given_global_amax_that_is_its_own_changes_nothing(format):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32, 64)), jnp.float32)
    own = formats.quantize(x, format, num_batch_axes=1)
    given = formats.quantize(x, format, num_batch_axes=1, global_amax=own.global_amax)
    np.testing.assert_array_equal(own.codes, given.codes)
    np.testing.assert_array_equal(own.scales, given.scales)
    with pytest.raises(ValueError, match=r"must be float32 of shape \(3,\), got float32 of shape"):
        formats.quantize(x, format, num_batch_axes=1, global_amax=own.global_amax[:2])
    with pytest.raises(ValueError, match="belongs to the NVFP4 formats, mxfp4 has none"):
        formats.quantize(x, "mxfp4", num_batch_axes=1, global_amax=own.global_amax)
