"""The grouped FP4 matmul of data-centre Blackwell in interpret mode, races detected: layouts of hardware are not seen.

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats, private_jax
from pallas_kernels.grouped_matmul import (
    mosaic_sm100,
    mosaic_sm100_loop,
    reference,
    row_copies,
)
from pallas_kernels.grouped_matmul.mosaic_sm100 import Tiling
from tests import fp4_products as products
from tests.mutants import mosaic_sm100 as mutants
from tests.mutants import mutated, parameters

_SMALL = Tiling(stages=2, epilogue_n=64)


def _compiled(*operands, **options):
    return products.compiled(*operands, **{"module": mosaic_sm100, "tiling": _SMALL} | options)


def _call(*operands, **options):
    return products.call(*operands, **{"module": mosaic_sm100, "tiling": _SMALL} | options)


@pytest.mark.parametrize(
    "format, num_columns, sizes, num_rows, tiling, num_sms, out_dtype",
    [
        # Blocks shared by four groups, empty groups, one row, a ragged end, rows of nobody over two blocks.
        ("nvfp4", 128, [0, 78, 1, 0, 60, 13], 260, _SMALL, 1, jnp.float32),
        # Wide tiles, one accumulator, one stage, two SMs, every row taken, padded rows.
        (
            "mxfp4", 256, [3, 97, 0, 70], 170,
            Tiling(tile_n=256, accumulators=1, stages=1, epilogue_n=128), 2, jnp.bfloat16,
        ),
        # Two row tiles per turn, a longer k-step, swizzled stores, sizes beyond the rows.
        (
            "nvfp4", 256, [130, 200], 256,
            Tiling(tile_k=512, stages=2, group_order=2, epilogue_n=32, swizzled_out=True), 1, jnp.float32,
        ),
        ("mxfp4", 128, [0, 1, 0], 1, _SMALL, 3, jnp.float32),
        ("nvfp4", 128, [0, 0], 3, _SMALL, 1, jnp.bfloat16),
    ],
)  # fmt: skip
def test_small_numbers_are_exact(format, num_columns, sizes, num_rows, tiling, num_sms, out_dtype):
    rng = np.random.default_rng(0)
    x = products.exact(rng, format, num_rows, 512)
    w = formats.arranged(products.exact(rng, format, len(sizes), num_columns, 512), "tcgen05")
    expert_scale_E = jnp.asarray(2.0 ** np.arange(-1, len(sizes) - 1), jnp.float32)
    options = dict(tiling=tiling, num_sms=num_sms, out_dtype=out_dtype)
    got = _call(x, w, sizes, expert_scale_E=expert_scale_E, **options)
    expected = products.expected(x, w, sizes, expert_scale_E)
    assert got.dtype == out_dtype and got.shape == (num_rows, num_columns)
    # Sums are exact, so the only rounding is the last one.
    np.testing.assert_array_equal(got, jnp.asarray(expected, jnp.float32).astype(out_dtype))
    assert not np.asarray(got, np.float32)[sum(sizes) :].any()


@pytest.mark.parametrize(
    "format, out_dtype, tolerance",
    [
        # Sums of 512 float32 products in another order: a few units in the last place of the largest partial sum.
        ("nvfp4", jnp.float32, 2e-6),
        # Half a unit in the last place of bfloat16.
        ("mxfp4", jnp.bfloat16, 2**-8),
    ],
)
def test_reference(format, out_dtype, tolerance):
    """A scale per row and per expert, and a bias, as the reference has them."""
    sizes, num_rows = [40, 0, 88, 5], 140
    rng = np.random.default_rng(1)
    x, w, scales = products.quantized(rng, format, sizes, num_rows, 512, 128)
    bias_EN = jnp.asarray(rng.normal(size=(len(sizes), 128)), jnp.bfloat16)
    got = _call(x, w, sizes, bias_EN=bias_EN, out_dtype=out_dtype, **scales)
    expected = reference.grouped_matmul(
        formats.dequantize(x), w, jnp.asarray(sizes), bias_EN, None, jnp.float32
    )
    error = np.abs(np.asarray(got, np.float32) - expected)
    assert error.max() <= tolerance * np.abs(expected).max()
    assert not np.asarray(got, np.float32)[sum(sizes) :].any()


def test_rows_of_nobody_may_hold_anything():
    """Their codes, scales and row scales are NaN, and those of their block's owners are not touched."""
    sizes, num_rows = [20, 30], 60
    x, w, scales = products.quantized(np.random.default_rng(2), "nvfp4", sizes, num_rows, 256, 128)
    compiled, arguments = _compiled(x, w, sizes, **scales)
    clean = compiled(*arguments)
    tail_T = jnp.arange(num_rows) >= sum(sizes)
    nan = formats.BlockScaled(
        x.codes, jnp.where(tail_T[:, None], jnp.uint8(0x7F), x.scales), x.global_amax, x.format, x.rule
    )  # fmt: skip
    scales["row_scale_T"] = jnp.where(tail_T, jnp.nan, scales["row_scale_T"])
    got = compiled(nan, *arguments[1:3], arguments[3] | scales)
    np.testing.assert_array_equal(got, clean)
    assert not got[sum(sizes) :].any() and np.asarray(got[: sum(sizes)]).any(axis=1).all()


def test_no_rows():
    x, w, scales = products.quantized(np.random.default_rng(3), "nvfp4", [0, 0], 4, 256, 128)
    x = jax.tree.map(lambda leaf: leaf[:0], x)
    got = _call(x, w, [0, 0], **scales | {"row_scale_T": scales["row_scale_T"][:0]})
    assert got.shape == (0, 128)


class Case(NamedTuple):
    """Whether a result is right: of the kernel, and of a copy of its module."""

    kernel: Callable[[], bool]
    of_module: Callable[[types.ModuleType], bool]


@pytest.fixture(scope="module")
def case():
    """Four tiles, so that both accumulators and both stages are used again."""
    sizes, num_rows = [140, 0, 20, 28], 200
    x, w, scales = products.quantized(np.random.default_rng(4), "nvfp4", sizes, num_rows, 512, 128)
    expected = products.expected(x, w, sizes, np.ones(len(sizes)))

    def right(y_TN):
        return np.abs(np.asarray(y_TN) - expected).max() <= 1e-5 * np.abs(expected).max()

    compiled, arguments = _compiled(x, w, sizes, **scales)
    assert right(compiled(*arguments))
    return Case(
        lambda: right(compiled(*arguments)),
        lambda module: right(_call(x, w, sizes, module=module, **scales)),
    )


@pytest.mark.parametrize("mutant", parameters(mutants.MUTANTS))
def test_mutants(mutant, case, monkeypatch):
    module = mosaic_sm100
    if mutant in mutants.LOOP:
        monkeypatch.setattr(module, "main_loop", mutated(mosaic_sm100_loop.__name__, mutant))
    elif mutant in mutants.COPIES:
        monkeypatch.setattr(module, "row_copies", mutated(row_copies.__name__, mutant))
    else:
        module = mutated(mosaic_sm100.__name__, mutant)
    try:
        caught = None if case.of_module(module) else "numerics"
    except Exception as error:
        private_jax.reset_interpreter()
        assert "RACE DETECTED" in str(error) or "arrier" in str(error), error
        caught = "race"
    monkeypatch.undo()
    assert caught is not None
    assert mutant.caught_by in (caught, "either")
    assert case.kernel()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tile_n=64), "tile_n must be"),
        (dict(tile_k=128), "tile_k must be"),
        (dict(accumulators=3), "accumulators must be"),
        (dict(epilogue_n=128), "epilogue_n must be"),
        (dict(stages=0), "stages must be"),
        (dict(group_order=0), "group_order must be"),
    ],
)
def test_tiling_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**options)


def test_budgets():
    """36,864 bytes a stage: 2 * 128 * 256 codes of half a byte, 2 * 128 * 16 scales; and 32,768 of two buffers."""
    tiling = Tiling()
    assert tiling.stage_bytes("nvfp4") == 36_864 and tiling.stage_bytes("mxfp4") == 34_816
    assert tiling.smem_bytes("nvfp4", jnp.bfloat16) == 5 * 36_864 + 32_768 + 1024
    assert tiling.tmem_columns("nvfp4") == 2 * 128 + 2 * 16
    both = Tiling(tile_n=256, collective=True, accumulators=1)
    assert (both.tile_m, both.loaded_n) == (256, 128)
    assert both.stage_bytes("nvfp4") == 2 * 16_384 + 2048 + 4096
    # As products take it: columns of 128 bytes, swizzled.
    assert tiling.storing(jnp.float32) == Tiling(epilogue_n=32, swizzled_out=True)
    assert tiling.storing(jnp.bfloat16) == Tiling(epilogue_n=64, swizzled_out=True)
    with pytest.raises(ValueError, match="shared memory"):
        Tiling(stages=7).check_budgets("nvfp4", jnp.bfloat16)
    with pytest.raises(ValueError, match="tensor memory"):
        Tiling(tile_n=256, stages=2).check_budgets("mxfp4", jnp.bfloat16)
    with pytest.raises(ValueError, match="swizzled_out needs .* 128 bytes"):
        Tiling(swizzled_out=True, stages=2).check_budgets("nvfp4", jnp.float32)
    # A copy that begins at an odd row of 64 bytes would fault.
    with pytest.raises(ValueError, match="a multiple of 128 bytes, got 32 of bfloat16"):
        Tiling(epilogue_n=32).check_budgets("nvfp4", jnp.bfloat16)


def test_refuses():
    rng = np.random.default_rng(5)
    x, w, scales = products.quantized(rng, "nvfp4", [4, 4], 8, 512, 128)

    def refused(message, error=ValueError, x=x, w=w, sizes=(4, 4), **options):
        with pytest.raises(error, match=message):
            _call(x, w, sizes, **scales | options)

    def cut(q, columns):
        block = formats.FORMATS[q.format].block
        codes, scales = q.codes[..., : columns // 2], q.scales[..., : columns // block]
        return dataclasses.replace(q, codes=codes, scales=scales)

    refused("K must be a multiple", x=cut(x, 128), w=cut(w, 128))
    refused("3072", w=jax.tree.map(lambda leaf: leaf[:, :64] if leaf.ndim > 1 else leaf, w))
    refused(r"x \(T, K\)", x=cut(x, 256))
    refused("one kind", w=products.exact(rng, "mxfp4", 2, 128, 512))
    refused("NVFP4 or MXFP4", w=formats.quantize(jnp.ones((2, 128, 512)), "mxfp8_e4m3"))
    refused("group_sizes_E", sizes=(4, 4, 0))
    refused("row_scale_T", row_scale_T=jnp.ones(9))
    refused("expert_scale_E", expert_scale_E=jnp.ones(2, jnp.bfloat16))
    refused("out_dtype", out_dtype=jnp.float16)
    refused("num_sms", num_sms=0)
    refused("two CTAs", NotImplementedError, tiling=Tiling(stages=2, collective=True), num_sms=2)
