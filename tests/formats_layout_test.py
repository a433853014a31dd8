"""How codes and scales lie in memory: nibbles, 128x4 tiles of scales, padded groups, and MXFP4 as NVFP4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_spec import F32, STACK, assert_same

from pallas_kernels import formats

BYTE_FORMATS = [name for name, spec in formats.FORMATS.items() if not spec.float_scales]


def test_pack_and_unpack():
    code = np.random.default_rng(6).integers(0, 16, (3, 5, 32), dtype=np.uint8)
    packed = formats.pack(code)
    np.testing.assert_array_equal(packed, code[..., 0::2] + 16 * code[..., 1::2])
    np.testing.assert_array_equal(formats.unpack(packed), code)
    np.testing.assert_array_equal(formats.pack(np.array([1, 2], np.uint8)), [0x21])


@pytest.mark.parametrize("shape", [(128, 4), (256, 12), (1, 1), (130, 5), (300, 90)])
def test_swizzle_equals_the_offset_formula(shape):
    rows, columns = shape
    scale = np.random.default_rng(7).integers(1, 256, shape, dtype=np.uint8)
    swizzled = np.asarray(formats.swizzle(scale))
    tiles = (-(-rows // 128), -(-columns // 4))
    assert swizzled.shape == (*tiles, 32, 16)
    r, c = np.mgrid[:rows, :columns]
    offset = ((r // 128) * tiles[1] + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    want = np.zeros(tiles[0] * tiles[1] * 512, np.uint8)
    want[offset] = scale
    np.testing.assert_array_equal(swizzled.ravel(), want)
    np.testing.assert_array_equal(formats.unswizzle(swizzled, rows, columns), scale)


def test_swizzle_keeps_experts_apart():
    scale = np.random.default_rng(8).integers(0, 256, (3, 130, 8), dtype=np.uint8)
    swizzled = formats.swizzle(scale)
    np.testing.assert_array_equal(swizzled[1], formats.swizzle(scale[1]))
    np.testing.assert_array_equal(formats.unswizzle(swizzled, 130, 8), scale)


def test_bad_layouts_are_refused():
    with pytest.raises(ValueError, match=r"even last axis, got shape \(2, 3\)"):
        formats.pack(np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"have the shape \(2, 1, 32, 16\), got \(1, 1, 32, 16\)"):
        formats.unswizzle(np.zeros((1, 1, 32, 16), np.uint8), 129, 4)


@pytest.mark.parametrize("name", BYTE_FORMATS)
def test_swizzled_scales_of_a_value_and_back(name):
    x = np.random.default_rng(9).standard_normal((3, 144, 192)).astype(F32)
    q = formats.quantize(x, name)
    tiles = jax.jit(formats.swizzled_scales)(q)
    columns = 192 // formats.FORMATS[name].block
    assert tiles.shape == (3, 2, -(-columns // 4), 32, 16)
    back = formats.from_swizzled(q.codes, tiles, q.global_amax, name, q.rule)
    assert_same(back, q)
    assert (back.format, back.rule) == (q.format, q.rule)
    mapped = jax.vmap(lambda c, t, g: formats.from_swizzled(c, t, g, name, q.rule))
    assert_same(mapped(q.codes, tiles, q.global_amax), q)


def test_swizzled_views_refuse_what_they_cannot_hold():
    q = formats.quantize(STACK, "fp8_block")
    with pytest.raises(
        ValueError, match="'fp8_block' has no byte scales; allowed: nvfp4, nvfp4_2d"
    ):
        formats.swizzled_scales(q)
    q = formats.quantize(STACK[0, 0], "nvfp4")
    with pytest.raises(ValueError, match=r"at least two axes, got shape \(64,\)"):
        formats.swizzled_scales(q)
    q = formats.quantize(STACK, "nvfp4")
    tiles = formats.swizzled_scales(q)
    with pytest.raises(ValueError, match="unknown rule 'floor' for format nvfp4"):
        formats.from_swizzled(q.codes, tiles, q.global_amax, "nvfp4", "floor")
    with pytest.raises(ValueError, match="swizzled scales of 16 rows and 2 columns"):
        formats.from_swizzled(q.codes, tiles[..., :0, :, :], None, "mxfp4", "floor")


GROUPS = [
    [5, 0, 300, 128, 0, 67],  # sums to all rows
    [0, 0, 129, 1, 20, 3],  # leaves a tail
    [500, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 500],
    [0, 0, 0, 0, 0, 0],
    [400, 90, 50, 0, 0, 0],  # more than there are: cut off
]


@pytest.mark.parametrize("align", [128, 256])
@pytest.mark.parametrize("sizes", GROUPS)
def test_groups_are_padded_to_tiles_of_their_own(sizes, align):
    scale = np.random.default_rng(10).integers(1, 256, (500, 6), dtype=np.uint8)
    swizzle = jax.jit(formats.swizzle_groups, static_argnums=2)
    tiles, first = map(np.asarray, swizzle(scale, np.array(sizes, np.int32), align))
    assert tiles.shape[1:] == (2, 32, 16)
    used, start = np.zeros(len(tiles), bool), 0
    for group, size in enumerate(sizes):
        size = min(size, 500 - start)
        count = -(-size // align) * (align // 128)
        here = slice(first[group], first[group] + count)
        assert count == 0 or here.stop <= len(tiles)
        padded = np.zeros((count * 128, 6), np.uint8)
        padded[:size] = scale[start : start + size]
        np.testing.assert_array_equal(tiles[here], formats.swizzle(padded))
        assert not used[here].any()
        used[here] = True
        start += size
    assert not tiles[~used].any()
    back = jax.jit(formats.unswizzle_groups, static_argnums=(2, 3, 4))
    want = scale.copy()
    want[start:] = 0
    np.testing.assert_array_equal(back(tiles, np.array(sizes, np.int32), 500, 6, align), want)


def test_every_pattern_of_empty_groups_fits():
    # 130 rows in 4 groups never need more than (130 + 127 * 4) // 128 = 4 tiles.
    scale = np.random.default_rng(10).integers(1, 256, (130, 4), dtype=np.uint8)
    swizzle = jax.jit(formats.swizzle_groups)
    for sizes in ([1, 1, 127, 1], [129, 0, 0, 1], [1, 128, 1, 0], [0, 130, 0, 0], [43, 43, 43, 1]):
        tiles, _ = swizzle(scale, np.array(sizes, np.int32))
        assert tiles.shape == (4, 1, 32, 16)
        back = formats.unswizzle_groups(tiles, np.array(sizes, np.int32), 130, 4)
        np.testing.assert_array_equal(back, scale)


def test_no_more_tiles_than_groups_can_fill():
    for sizes, rows in (([1, 1, 1, 1], 4), ([0, 1, 0, 1], 2), ([0, 0, 0, 0], 0)):
        scale = np.full((rows, 4), 7, np.uint8)
        tiles, _ = formats.swizzle_groups(scale, np.array(sizes, np.int32))
        assert len(tiles) == rows
        back = formats.unswizzle_groups(tiles, np.array(sizes, np.int32), rows, 4)
        np.testing.assert_array_equal(back, scale)


def test_bad_groups_are_refused():
    sizes = np.array([1, 2], np.int32)
    with pytest.raises(ValueError, match="align must be a positive multiple of 128, got 100"):
        formats.swizzle_groups(np.zeros((4, 4), np.uint8), sizes, 100)
    with pytest.raises(ValueError, match=r"scales \[rows, columns\], got \(2, 4, 4\)"):
        formats.swizzle_groups(np.zeros((2, 4, 4), np.uint8), sizes)


# --- MXFP4 as NVFP4 -------------------------------------------------------------------------------


def mxfp4(scales, codes=None):
    """MXFP4 [..., 32 * blocks] with given scale bytes and every code in every block, or given ones."""
    scales = np.array(scales, np.uint8)
    if codes is None:
        codes = np.tile(np.arange(16, dtype=np.uint8), (*scales.shape[:-1], 2 * scales.shape[-1]))
    return formats.BlockScaled(formats.pack(codes), jnp.asarray(scales), None, "mxfp4", "rceil")


@pytest.mark.parametrize("largest", [9, 17, 60, 127, 200, 251])
def test_casting_keeps_codes_and_values(largest):
    # Scales down to 2^17 below the largest one: 2^8 to 2^-9 in E4M3, the last two as subnormals.
    q = mxfp4([[largest, max(largest - 17, 0), max(largest - 16, 0), max(largest - 3, 0)]])
    cast = formats.mxfp4_to_nvfp4(q)
    assert (cast.format, cast.rule, cast.scales.shape) == ("nvfp4", "amax", (1, 8))
    assert_same(cast.codes, q.codes)
    assert float(cast.global_amax) == 2688.0 * 2.0 ** (largest - 127 - 8)
    # 2^8 is field 15 without mantissa: 0x78; 2^-9 is the smallest subnormal.
    assert int(cast.scales[0, 0]) == 0x78 and (largest < 17 or int(cast.scales[0, 2]) == 1)
    np.testing.assert_array_equal(formats.dequantize(cast), formats.dequantize(q))


@pytest.mark.parametrize("rule", formats.FORMATS["mxfp4"].rules)
def test_casting_quantized_weights_is_exact(rule):
    x = 0.02 * np.random.default_rng(13).standard_normal((4, 64, 96)).astype(F32)
    x *= np.array([1, 1e-6, 1e6, 0], F32)[:, None, None]
    q = formats.quantize(x, "mxfp4", rule=rule)
    cast = formats.mxfp4_to_nvfp4(q)
    assert cast.global_amax.shape == (4,)
    np.testing.assert_array_equal(formats.dequantize(cast), formats.dequantize(q))
    per_row = formats.mxfp4_to_nvfp4(q, num_batch_axes=2)
    assert per_row.global_amax.shape == (4, 64)
    np.testing.assert_array_equal(formats.dequantize(per_row), formats.dequantize(q))
    compiled = jax.jit(lambda q: formats.mxfp4_to_nvfp4(q, rounding=True))(q)
    assert_same(compiled, cast)


def test_blocks_without_a_value_do_not_count_and_nan_stays():
    codes = np.zeros((1, 128), np.uint8)
    codes[0, :32], codes[0, 32:64] = 7, 8  # 6, and -0 below a huge scale
    q = mxfp4([[100, 250, 255, 0]], codes)
    cast = formats.mxfp4_to_nvfp4(q)
    np.testing.assert_array_equal(cast.scales, [[0x78, 0x78, 0, 0, 0x7F, 0x7F, 0, 0]])
    assert int(formats.count_nonfinite(cast)) == 2
    np.testing.assert_array_equal(formats.dequantize(cast), formats.dequantize(q))
    nothing = formats.mxfp4_to_nvfp4(mxfp4([[3, 4]], np.zeros((1, 64), np.uint8)))
    assert float(nothing.global_amax[()]) == 0 and not np.asarray(formats.dequantize(nothing)).any()


def test_blocks_out_of_range_are_an_error_or_rounded():
    q = mxfp4([[120, 120 - 18, 120 - 20, 120 - 60]])
    with pytest.raises(ValueError, match="within 2\\^17 of the largest one: 3 of 4 blocks"):
        formats.mxfp4_to_nvfp4(q)
    cast = formats.mxfp4_to_nvfp4(q, rounding=True)
    value, unit = np.asarray(formats.dequantize(cast))[0].reshape(4, 32), 2.0 ** (120 - 127 - 17)
    exact = np.asarray(formats.dequantize(q))[0].reshape(4, 32)
    np.testing.assert_array_equal(value[0], exact[0])
    # A scale 2 times too small: 0, .5, 1, 1.5, 2, 3, 4, 6 become halves, rounded to even codes:
    #   0, .25 -> 0, .5, .75 -> 1, 1, 1.5, 2, 3.  8 times: 0, .06 -> 0, .125 -> 0, .19 -> 0, .25 -> 0, .375 -> .5,
    #   .5, .75 -> 1.  2^43 times: nothing is left.
    np.testing.assert_array_equal(value[1, :8] / unit, [0, 0, 0.5, 1, 1, 1.5, 2, 3])
    np.testing.assert_array_equal(value[2, :8] / unit, [0, 0, 0, 0, 0, 0.5, 0.5, 1])
    assert not value[3].any()


def test_what_cannot_be_cast_is_refused():
    with pytest.raises(ValueError, match="needs format mxfp4, got nvfp4"):
        formats.mxfp4_to_nvfp4(formats.quantize(STACK, "nvfp4"))
    with pytest.raises(ValueError, match="num_batch_axes must be from 0 to 1, got 2"):
        formats.mxfp4_to_nvfp4(mxfp4([[100]]), num_batch_axes=2)
    for largest in (252, 8):
        with pytest.raises(ValueError, match=r"largest scales from 2\^-118 to 2\^124"):
            formats.mxfp4_to_nvfp4(mxfp4([[largest]]))
    with pytest.raises(
        ValueError, match="traced scales fit: call it outside jit, or with rounding"
    ):
        jax.jit(formats.mxfp4_to_nvfp4)(mxfp4([[100]]))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "mxfp8_e4m3"])
def test_arranged_for_tensor_cores_and_back(format):
    w_ENK = jax.random.normal(jax.random.key(0), (3, 40, 96))
    q = formats.quantize(w_ENK, format)
    tiles = formats.arranged(q, "tcgen05")
    assert tiles.scales.shape == (3, 1, -(-96 // formats.FORMATS[format].block // 4), 32, 16)
    assert tiles.shape == q.shape
    assert np.array_equal(formats.arranged(tiles, "linear").scales, q.scales)
    assert np.array_equal(formats.dequantize(tiles), formats.dequantize(q))
    # Slicing the leading axis, as scan does, keeps an expert's own tiles.
    one = jax.tree.map(lambda leaf: leaf[1], tiles)
    assert np.array_equal(formats.dequantize(one), formats.dequantize(q)[1])
    rows_innermost = formats.arranged(tiles, "block_major")
    assert np.array_equal(rows_innermost.scales, np.swapaxes(q.scales, 1, 2))
    assert np.array_equal(formats.arranged(rows_innermost, "tcgen05").scales, tiles.scales)
    assert np.array_equal(formats.dequantize(rows_innermost), formats.dequantize(q))


def test_arranged_refuses_what_has_no_tiles():
    q = formats.quantize(jnp.ones((128, 128)), "fp8_block")
    with pytest.raises(ValueError, match="only byte scales"):
        formats.arranged(q, "tcgen05")
    with pytest.raises(ValueError, match="one of linear, tcgen05, block_major"):
        formats.arranged(q, "hopper")
