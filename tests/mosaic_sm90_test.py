"""Hopper's weight-only grouped matmul in interpret mode, races detected, reads of `wgmma` among them.

Not seen: layouts of hardware, registers that are overwritten while a product runs, and the way in which a GPU takes
codes apart, which is only compared as numbers (`test_pairs`).

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats, private_jax
from pallas_kernels.formats import elements
from pallas_kernels.grouped_matmul import (
    mosaic_sm90,
    mosaic_sm90_decode,
    mosaic_sm90_loop,
    mosaic_sm90_rows,
    mosaic_sm90_tiling,
    reference,
)
from pallas_kernels.grouped_matmul.mosaic_sm90 import Tiling
from tests.mutants import mosaic_sm90 as mutants
from tests.mutants import mutated, parameters

# Few pseudo-threads stand for asynchronous copies: where two share one, a race between them goes unseen.
_INTERPRET = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=32)
_SMALL = Tiling(tile_m=128, tile_n=8, tile_k=64, stages=2)
_FORMATS = ("nvfp4", "mxfp4")


def _compiled(x_TK, w, sizes_E, *, tiling=_SMALL, num_sms=1, **options):
    """Returns a compiled call, and its arguments."""
    options = {"out_dtype": jnp.float32, "interpret": _INTERPRET} | options
    names = ("expert_scale_E", "row_scale_T", "bias_EN")
    arrays = {name: options.pop(name, None) for name in names}

    def call(x_TK, w, sizes_E, arrays):
        return mosaic_sm90.grouped_matmul_codes(
            x_TK, w, sizes_E, tiling=tiling, num_sms=num_sms, **arrays, **options
        )

    arguments = x_TK, w, jnp.asarray(sizes_E, jnp.int32), arrays
    return jax.jit(call).lower(*arguments).compile(), arguments


def _call(*operands, **options):
    compiled, arguments = _compiled(*operands, **options)
    return compiled(*arguments)


def _exact(rng, format, sizes, num_rows, num_columns, depth):
    """Small integers, and random codes with scales 1/2, 1 and 2: products and sums are exact in float32."""
    shape = len(sizes), num_columns, depth
    powers = {"nvfp4": (48, 56, 64), "mxfp4": (126, 127, 128)}[format]
    codes = formats.pack(jnp.asarray(rng.integers(0, 16, shape), jnp.uint8))
    blocks = (*shape[:-1], depth // formats.FORMATS[format].block)
    scales = jnp.asarray(rng.choice(powers, blocks), jnp.uint8)
    # A power of two below an amax of 2688: global scales 1/2, 1, 2, ..
    amax_E = jnp.asarray(2688 * 2.0 ** np.arange(-1, len(sizes) - 1), jnp.float32)
    rule = formats.FORMATS[format].rules[0]
    w = formats.BlockScaled(codes, scales, amax_E if format == "nvfp4" else None, format, rule)
    return jnp.asarray(rng.integers(-8, 9, (num_rows, depth)), jnp.bfloat16), w


@functools.cache
def _exact_case(format):
    """A compiled call that takes any sizes of five groups among 40 rows."""
    x_TK, w = _exact(np.random.default_rng(0), format, [0] * 5, 40, 128, 128)
    tiling = Tiling(tile_m=64, tile_n=16, tile_k=64, stages=2)
    return _compiled(x_TK, w, [0] * 5, tiling=tiling, num_sms=2)


@pytest.mark.parametrize(
    "format, sizes",
    [
        ("nvfp4", [3, 0, 17, 1, 9]),  # ragged, an empty group, one row, ten rows of nobody
        ("nvfp4", [16, 0, 0, 24, 0]),
        ("nvfp4", [0, 1, 0, 0, 0]),
        ("nvfp4", [0, 0, 0, 0, 0]),
        ("mxfp4", [0, 0, 0, 0, 40]),
        ("mxfp4", [31, 0, 17, 0, 2]),  # more than there are rows
    ],
)
def test_small_integers_are_exact(format, sizes):
    compiled, (x_TK, w, _, arrays) = _exact_case(format)
    sizes_E = jnp.asarray(sizes, jnp.int32)
    got = compiled(x_TK, w, sizes_E, arrays)
    cut_E = jnp.diff(jnp.minimum(jnp.cumsum(sizes_E), 40), prepend=jnp.zeros(1, jnp.int32))
    expected = reference.grouped_matmul(x_TK, w, cut_E, None, None, jnp.float32)
    np.testing.assert_array_equal(got, expected)
    assert not np.asarray(got)[sum(sizes) :].any()


@pytest.mark.parametrize(
    "format, tiling, out_dtype, tolerance",
    [
        # Half a unit in the last place of the result.
        ("nvfp4_46", Tiling(tile_m=64, tile_n=24, tile_k=128, stages=3), jnp.float16, 2**-11),
        ("mxfp4", Tiling(tile_m=128, tile_n=8, tile_k=256, stages=2), jnp.bfloat16, 2**-8),
    ],
)
def test_reference(format, tiling, out_dtype, tolerance):
    """Scales of rows and experts, a bias, a NaN row and a NaN block that reach no other row and no other column."""
    sizes, num_rows = [9, 0, 3], 14
    rng = np.random.default_rng(1)
    x_TK = rng.normal(size=(num_rows, 256))
    x_TK[2], x_TK[sum(sizes) :] = np.nan, np.nan
    x_TK = jnp.asarray(x_TK, jnp.bfloat16)
    w_ENK = rng.normal(size=(3, 128, 256))
    w_ENK[2, 100, 70] = np.nan
    w = formats.quantize(jnp.asarray(w_ENK, jnp.float32), format)
    extras = {
        "row_scale_T": jnp.asarray(rng.uniform(0.5, 2, num_rows), jnp.float32),
        "bias_EN": jnp.asarray(rng.normal(size=(3, 128)), jnp.bfloat16),
    }
    options = dict(tiling=tiling, out_dtype=out_dtype, **extras)
    loaded = formats.arranged(formats.arranged(w, "tcgen05"), "block_major")
    got = np.asarray(_call(x_TK, loaded, sizes, **options), np.float32)
    expected = reference.grouped_matmul(
        x_TK, w, jnp.asarray(sizes), extras["bias_EN"], extras["row_scale_T"], jnp.float32
    )
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=tolerance * np.nanmax(np.abs(expected)), equal_nan=True
    )
    nan_TN = np.isnan(got)
    assert nan_TN[2].all() and nan_TN[9:12, 100].all() and nan_TN.sum() == 128 + 3
    assert not got[sum(sizes) :].any()


def test_no_rows():
    x_TK, w = _exact(np.random.default_rng(2), "mxfp4", [0, 0], 4, 128, 64)
    assert _call(x_TK[:0], w, [0, 0]).shape == (0, 128)


@pytest.mark.parametrize("code", range(4))
def test_every_word_and_scale(code):
    """All codes at all places of a word, times every E4M3 scale and every E8M0 scale whose products are normal."""
    word = np.arange(2**16, dtype=np.uint16)[:, None]
    nibble = (word >> 4 * code) & 15
    value = np.asarray(elements.decode(jnp.asarray(nibble, jnp.uint8), formats.E2M1), np.float32)

    def decoded(scale):
        scale = jnp.broadcast_to(scale, word.shape)
        got = mosaic_sm90_decode.values(jnp.asarray(word), code, scale, interpreted=True)
        assert got.dtype == jnp.bfloat16
        return np.asarray(got, np.float32) / mosaic_sm90_decode.FRACTION

    np.testing.assert_array_equal(decoded(jnp.bfloat16(1)), value)
    e4m3 = jnp.arange(0x7F, dtype=jnp.uint8)
    e4m3 = jax.lax.bitcast_convert_type(e4m3, jnp.float8_e4m3fn)
    e8m0 = jnp.arange(1, 252, dtype=jnp.uint8)
    for bits in (e4m3, e8m0):
        scales = mosaic_sm90_decode._decoded(bits)
        true = np.asarray(bits, np.float32)
        if bits.dtype == jnp.uint8:
            true = 2.0 ** (true - 127)
        np.testing.assert_array_equal(np.asarray(scales, np.float32), true)
        # 16 words have all codes; the value is exact, since bfloat16 has room for both significands.
        few = jnp.asarray(np.arange(16, dtype=np.uint16)[:, None] << np.uint16(4 * code))
        few = jnp.broadcast_to(few, (16, len(true)))
        got = mosaic_sm90_decode.values(
            few, code, jnp.broadcast_to(scales, few.shape), interpreted=True
        )
        codes = elements.decode(jnp.arange(16, dtype=jnp.uint8), formats.E2M1)
        expected = np.asarray(codes, np.float32)[:, None] * true * mosaic_sm90_decode.FRACTION
        normal = np.abs(expected) >= 2.0**-126  # a CPU flushes the others
        np.testing.assert_array_equal(
            np.where(normal, np.asarray(got, np.float32), 0), np.where(normal, expected, 0)
        )


def test_nan_scales():
    nan = jax.lax.bitcast_convert_type(jnp.full(1, 0x7F, jnp.uint8), jnp.float8_e4m3fn)
    for scale in (nan, jnp.full(1, 0xFF, jnp.uint8)):
        zero = jnp.zeros((1, 1), jnp.uint16)
        scale = mosaic_sm90_decode._decoded(scale)[None]
        assert np.isnan(mosaic_sm90_decode.values(zero, 0, scale, interpreted=True)).all()


@pytest.mark.parametrize("code", range(4))
def test_pairs(code):
    """What a GPU does with two words in 32 bits is what interpret mode does with each."""
    rng = np.random.default_rng(code)
    low = np.arange(2**16, dtype=np.uint32)
    high = rng.integers(0, 2**16, 2**16, dtype=np.uint32)

    def shift(pair, left):
        return pair << np.uint32(left) if left >= 0 else pair >> np.uint32(-left)

    pair = mosaic_sm90_decode.fields_of_pair(low | high << np.uint32(16), code, shift, np.uint32)
    for got, part in zip(pair, (0, 1), strict=True):
        for word, half in ((low, got & np.uint32(0xFFFF)), (high, got >> np.uint32(16))):
            words = jnp.asarray(word, jnp.uint16)
            np.testing.assert_array_equal(
                mosaic_sm90_decode.fields_of_words(words, code)[part], half
            )


def _tiles_by_hand(sizes, num_rows, tile_n):
    """(expert, row, aligned row, rows) of each tile."""
    found, start, aligned = [], 0, 0
    for expert, size in enumerate(sizes):
        end = min(start + size, num_rows)
        for row in range(start, end, tile_n):
            found.append((expert, row, aligned + row - start, min(tile_n, end - row)))
        aligned += -(-(end - start) // 8) * 8
        start = end
    return found


def test_rows():
    rng = np.random.default_rng(3)
    tiles_of = jax.jit(mosaic_sm90_rows.row_tiles, static_argnums=(1, 2))
    aligned = jax.jit(mosaic_sm90_rows.aligned, static_argnums=2)
    x_TK = jnp.arange(40)[:, None]
    random = [
        rng.multinomial(rng.integers(0, 45), rng.dirichlet(np.full(5, 0.3))) for _ in range(30)
    ]
    worst = [np.array(sizes) for sizes in ([9, 9, 9, 9, 4], [1] * 5, [0, 0, 0, 0, 40], [0] * 5)]
    for sizes in (*random, *worst):
        expected = _tiles_by_hand(sizes, 40, 8)
        got = jax.device_get(tiles_of(jnp.asarray(sizes, jnp.int32), 40, 8))
        rows = np.stack(got[:4], axis=1)
        assert [tuple(row) for row in rows[: got.count]] == expected and not rows[got.count :].any()
        x_PK = np.asarray(aligned(x_TK, jnp.asarray(sizes, jnp.int32), 16))
        assert len(x_PK) == 40 + 7 * 5
        for _, row, at, count in expected:
            assert at % 8 == 0
            np.testing.assert_array_equal(x_PK[at : at + count, 0], np.arange(row, row + count))


def test_order_of_columns():
    """Step of 8: columns 0 4 are the codes 0 of two words, 1 5 the codes 1, and so on."""
    x_1K = jnp.arange(16)[None]
    got = mosaic_sm90_decode.interleaved(x_1K, 8)
    assert got[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    codes = jnp.asarray([[0x21, 0x43, 0x65, 0x87]], jnp.uint8)
    assert mosaic_sm90_decode.words(codes).tolist() == [[0x4321, 0x8765]]


class Case(NamedTuple):
    """Whether a result is right: of the kernel as compiled once, and compiled again."""

    kernel: Callable[[], bool]
    again: Callable[[], bool]


@pytest.fixture(scope="module")
def case():
    """Three tiles of two steps, so that both stages and both buffers of results are used again."""
    sizes, num_rows = [9, 0, 5], 18
    x_TK, w = _exact(np.random.default_rng(4), "nvfp4", sizes, num_rows, 128, 128)
    expected = reference.grouped_matmul(x_TK, w, jnp.asarray(sizes), None, None, jnp.float32)
    compiled, arguments = _compiled(x_TK, w, sizes)

    def right(y_TN):
        return np.array_equal(y_TN, expected)

    assert right(compiled(*arguments))
    return Case(
        lambda: right(compiled(*arguments)),
        lambda: right(_call(x_TK, w, sizes)),
    )


@pytest.mark.parametrize("name, mutant", parameters(mutants.MUTANTS))
def test_mutants(name, mutant, case, monkeypatch):
    copy = mutated(f"pallas_kernels.grouped_matmul.{name}", mutant)
    if name == "mosaic_sm90_loop":
        monkeypatch.setattr(mosaic_sm90, "loop", copy)
    elif name == "mosaic_sm90_decode":
        monkeypatch.setattr(mosaic_sm90, "decode", copy)
        monkeypatch.setattr(mosaic_sm90_loop, "decode", copy)
    elif name == "row_copies":
        monkeypatch.setattr(mosaic_sm90_loop, "row_copies", copy)
    else:
        monkeypatch.setattr(mosaic_sm90, "rows", copy)
    try:
        caught = None if case.again() else "numerics"
    except Exception as error:
        private_jax.reset_interpreter()
        assert "RACE DETECTED" in str(error) or "arrier" in str(error), error
        caught = "race"
    monkeypatch.undo()
    assert caught is not None
    assert mutant.caught_by in (caught, "either")
    # What a kernel that raised leaves behind does not make the next one fail.
    assert caught == "numerics" or case.kernel()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tile_m=256), "tile_m must be"),
        (dict(tile_n=12), "tile_n must be"),
        (dict(tile_n=264), "tile_n must be"),
        (dict(tile_k=32), "tile_k must be"),
        (dict(stages=1), "stages must be"),
    ],
)
def test_tiling_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**options)


def test_budgets():
    """A stage of 128 x 128 x 128: 8,192 bytes of codes, 1,024 (512) of scales, 32,768 of rows; 32,768 of results."""
    tiling = Tiling(tile_m=128, tile_n=128, tile_k=128, stages=4)
    assert tiling.smem_bytes("nvfp4", jnp.bfloat16) == 4 * (8192 + 1024 + 32_768) + 32_768 + 1024
    assert tiling.smem_bytes("mxfp4", jnp.bfloat16) == 4 * (8192 + 512 + 32_768) + 32_768 + 1024
    for rows in (0.1, 1, 4, 30, 1000):
        for shape in ((2048, 7168), (64, 2880), (192, 128), (128, 256)):
            for format in _FORMATS:
                for dtype in mosaic_sm90.OUT_DTYPES:
                    found = mosaic_sm90.default_tiling(rows, *shape, format, dtype)
                    found.check_budget(format, dtype)
                    assert shape[0] % found.tile_m == 0 and shape[1] % found.tile_k == 0
                    assert found.stages >= 3
    assert mosaic_sm90.default_tiling(4, 2048, 7168, "nvfp4", jnp.bfloat16).tile_n == 8
    with pytest.raises(ValueError, match="shared memory"):
        dataclasses.replace(tiling, stages=6).check_budget("nvfp4", jnp.bfloat16)
    with pytest.raises(ValueError, match="multiples of 64"):
        mosaic_sm90_tiling.default_tiling(1, 96, 128, "nvfp4", jnp.bfloat16)


def test_refuses():
    x_TK, w = _exact(np.random.default_rng(5), "nvfp4", [4, 4], 8, 128, 128)

    def refused(message, x_TK=x_TK, w=w, sizes=(4, 4), **options):
        with pytest.raises(ValueError, match=message):
            _call(x_TK, w, sizes, **options)

    refused("K must be a multiple of tile_k = 256, got 128", tiling=Tiling(tile_k=256))
    narrow = dataclasses.replace(w, codes=w.codes[:, :64], scales=w.scales[:, :64])
    refused("N must be a multiple of tile_m = 128, got 64", w=narrow)
    refused(r"x \(T, K\)", x_TK=x_TK[:, :64])
    refused("bfloat16 rows, got float32", x_TK=x_TK.astype(jnp.float32))
    refused("NVFP4 or MXFP4", w=formats.quantize(jnp.ones((2, 128, 128)), "mxfp8_e4m3"))
    refused("group_sizes_E", sizes=(4, 4, 0))
    refused("row_scale_T", row_scale_T=jnp.ones(9))
    refused("expert_scale_E", expert_scale_E=jnp.ones(2, jnp.bfloat16))
    refused("bias_EN", bias_EN=jnp.ones((2, 64)))
    refused("scale_EBN", w=dataclasses.replace(w, scales=w.scales[:, :64]))
    refused("out_dtype", out_dtype=jnp.float8_e4m3fn)
    refused("num_sms", num_sms=0)
    refused("shared memory", tiling=Tiling(tile_n=256, tile_k=64, stages=6), out_dtype=jnp.float32)
