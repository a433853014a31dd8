"""The grouped FP4 matmul of few rows on data-centre Blackwell in interpret mode, races detected: hardware is not seen.

T rows sorted by expert, K contraction axis, N output axis, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    MatmulPrecision,
    device,
    formats,
    private_jax,
    quantized_grouped_matmul,
    roofline,
    schedules,
)
from pallas_kernels.grouped_matmul import kernels, mosaic_sm100, reference, row_copies
from pallas_kernels.grouped_matmul import mosaic_sm100_decode as decode
from pallas_kernels.grouped_matmul.mosaic_sm100_decode import Tiling
from tests import fp4_products as products
from tests.mutants import mosaic_sm100_decode as mutants
from tests.mutants import mutated, parameters

_SMALL = Tiling(stages=2)


def _call(*operands, **options):
    return products.call(*operands, **{"module": decode, "tiling": _SMALL} | options)


@pytest.mark.parametrize(
    "format, num_columns, sizes, num_rows, tiling, num_sms, out_dtype",
    [
        # A block that four experts share, one with several blocks, empty groups, rows of nobody over two blocks.
        ("nvfp4", 256, [0, 2, 1, 0, 3, 9], 33, _SMALL, 2, jnp.float32),
        # Larger blocks, one accumulator, one stage, a longer step; sizes beyond the rows.
        ("mxfp4", 128, [3, 20, 0, 30], 40, Tiling(tile_t=16, tile_k=512, stages=1, accumulators=1), 1, jnp.bfloat16),
        pytest.param(
            "nvfp4", 128, [5, 60, 2], 67, Tiling(tile_t=64, stages=3), 1, jnp.bfloat16, marks=pytest.mark.slow
        ),
        # One token.
        ("mxfp4", 128, [0, 1, 0], 1, _SMALL, 3, jnp.float32),
        ("nvfp4", 128, [0, 0], 3, _SMALL, 1, jnp.bfloat16),
    ],
)  # fmt: skip
def test_small_numbers_are_exact(format, num_columns, sizes, num_rows, tiling, num_sms, out_dtype):
    rng = np.random.default_rng(0)
    x = products.exact(rng, format, num_rows, 512)
    w = formats.arranged(products.exact(rng, format, len(sizes), num_columns, 512), "tcgen05")
    scales = dict(
        expert_scale_E=jnp.asarray(2.0 ** np.arange(-1, len(sizes) - 1), jnp.float32),
        row_scale_T=jnp.asarray(2.0 ** rng.integers(-2, 3, num_rows), jnp.float32),
        bias_EN=jnp.asarray(rng.integers(-4, 5, (len(sizes), num_columns)), jnp.bfloat16),
    )
    got = _call(x, w, sizes, tiling=tiling, num_sms=num_sms, out_dtype=out_dtype, **scales)
    wanted = products.expected(x, w, sizes, *scales.values())
    assert got.dtype == out_dtype and got.shape == (num_rows, num_columns)
    # Sums are exact, so the only rounding is the last one.
    np.testing.assert_array_equal(got, jnp.asarray(wanted, jnp.float32).astype(out_dtype))
    assert not np.asarray(got, np.float32)[sum(sizes) :].any()


def test_rows_may_come_as_tensor_cores_want_them_elsewhere():
    """Scales in tiles of 128 rows, as the quantize kernel leaves them; without a scale per row, and without a bias."""
    sizes = [4, 0, 9]
    x, w, scales = products.quantized(np.random.default_rng(1), "mxfp4", sizes, 14, 256, 128)
    got = _call(formats.arranged(x, "tcgen05"), w, sizes, **scales)
    wanted = reference.grouped_matmul(
        formats.dequantize(x), w, jnp.asarray(sizes), None, None, jnp.float32
    )
    # Sums of 256 products in another order.
    np.testing.assert_allclose(got, wanted, atol=2e-6 * np.abs(wanted).max())


def test_rows_of_nobody_may_hold_anything():
    """Their scales and row scales are NaN, and those of their block's owners are not touched."""
    sizes, num_rows = [2, 3], 12
    x, w, scales = products.quantized(np.random.default_rng(2), "nvfp4", sizes, num_rows, 256, 128)
    clean = _call(x, w, sizes, **scales)
    tail_T = jnp.arange(num_rows) >= sum(sizes)
    nan = formats.BlockScaled(
        x.codes, jnp.where(tail_T[:, None], jnp.uint8(0x7F), x.scales), x.global_amax, x.format, x.rule
    )  # fmt: skip
    scales["row_scale_T"] = jnp.where(tail_T, jnp.nan, scales["row_scale_T"])
    np.testing.assert_array_equal(_call(nan, w, sizes, **scales), clean)
    assert not clean[sum(sizes) :].any() and np.asarray(clean[: sum(sizes)]).any(axis=1).all()


@pytest.fixture(scope="module")
def case():
    """Operands, and whether a result is right. Five tiles: accumulators and stages are used again."""
    sizes, num_rows = [3, 0, 7, 9, 1], 23
    x, w, scales = products.quantized(np.random.default_rng(4), "nvfp4", sizes, num_rows, 512, 128)
    wanted = products.expected(x, w, sizes, np.ones(len(sizes)))

    def right(y_TN):
        return np.abs(np.asarray(y_TN) - wanted).max() <= 1e-5 * np.abs(wanted).max()

    compiled, arguments = products.compiled(x, w, sizes, module=decode, tiling=_SMALL, **scales)
    assert right(compiled(*arguments))
    return (
        lambda: right(compiled(*arguments)),
        lambda module: right(_call(x, w, sizes, module=module, **scales)),
    )


@pytest.mark.parametrize("mutant", parameters(mutants.MUTANTS))
def test_mutants(mutant, case, monkeypatch):
    kernel, of_module = case
    module = decode
    if mutant in mutants.COPIES:
        monkeypatch.setattr(decode, "row_copies", mutated(row_copies.__name__, mutant))
    else:
        module = mutated(decode.__name__, mutant)
    try:
        caught = None if of_module(module) else "numerics"
    except Exception as error:
        private_jax.reset_interpreter()
        assert "RACE DETECTED" in str(error) or "arrier" in str(error), error
        caught = "race"
    monkeypatch.undo()
    assert caught is not None
    assert mutant.caught_by in (caught, "either")
    assert kernel()


def test_few_rows_take_it_where_the_roofline_says_so():
    """Qwen3-30B's gate and up at one token: 8 experts' 96 tiles of 8 steps, one for each SM and none for many.

    Five stages: 8 steps of 1/5 us and one to begin, 2.6 us. Ten: 1.8 us, less than HBM's 1.85 us.
    """
    b200 = device.Device("gpu", "B200", (10, 0), 148)

    def tiling(rows, outputs, inputs, experts):
        w = jax.eval_shape(lambda: formats.quantize(jnp.zeros((experts, outputs, inputs)), "nvfp4"))
        return kernels.sm100_tiling(rows, "nvfp4", w, jnp.dtype(jnp.bfloat16), b200)

    assert tiling(8, 1536, 2048, 128) == Tiling(tile_t=8, stages=10)
    assert isinstance(tiling(512, 1536, 2048, 128), mosaic_sm100.Tiling)
    # HBM bounds DeepSeek-V3's at one token: nothing is gained.
    assert isinstance(tiling(8, 4096, 7168, 256), mosaic_sm100.Tiling)


def test_tiles_of_scales_count_in_the_choice():
    """1000 rows, one tile of columns: blocks of 8 have 125 tiles of 128 x 448 scales, written and read, 1.8 us of HBM.

    They would be done in 3.8 us, blocks of 16 in as much, of 32 in 4.1 us and a quarter of those bytes.
    """
    product = roofline.Product(roofline.even(1000, 8), 128, 7168, "nvfp4", "nvfp4", 2)
    assert schedules.choose_sm100(product) == "32x128, swapped"


def test_the_public_product_takes_it(monkeypatch):
    x_TK = jax.random.normal(jax.random.key(0), (6, 256))
    w = formats.quantize(jax.random.normal(jax.random.key(1), (4, 128, 256)), "nvfp4")
    sizes_E = jnp.array([1, 0, 2, 1], jnp.int32)
    called, product = [], decode.grouped_matmul_codes
    monkeypatch.setattr(
        decode, "grouped_matmul_codes", lambda *a, **k: called.append(k["tiling"]) or product(*a, **k)
    )  # fmt: skip
    monkeypatch.setattr(schedules, "choose_sm100", lambda *_: "16x128, swapped")
    options = dict(precision=MatmulPrecision(x="nvfp4"), out_dtype=jnp.float32)
    wanted = quantized_grouped_matmul(x_TK, w, sizes_E, implementation="reference", **options)
    here = device.Device("gpu", "B200", (10, 0), 2)
    with device.assume(here), kernels.interpreted(products.INTERPRET):
        got = quantized_grouped_matmul(x_TK, w, sizes_E, implementation="mosaic_sm100", **options)
    assert [tiling.tile_t for tiling in called] == [16]
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_budgets():
    """136 rows of 128 bytes and twice 128 rows of 16 scales: 21,504; so ten stages beside 2048 bytes to be stored."""
    tiling = decode.default_tiling(8, "nvfp4", jnp.bfloat16)
    assert tiling.stage_bytes("nvfp4") == 136 * 128 + 2 * 2048 == 21_504
    assert tiling.stages == 10
    assert tiling.smem_bytes("nvfp4", jnp.bfloat16) == 215_040 + 8 * 128 * 2 + 1024
    assert tiling.tmem_columns("nvfp4") == 2 * 8 + 2 * 16
    for format in ("nvfp4", "mxfp4"):
        for dtype in (jnp.bfloat16, jnp.float32):
            for tile_t in (8, 16, 32, 64):
                deepest = decode.default_tiling(tile_t, format, dtype)
                deepest.check_budgets(format, dtype)
                deeper = Tiling(tile_t=tile_t, stages=deepest.stages + 1)
                with pytest.raises(ValueError, match="of shared memory"):
                    deeper.check_budgets(format, dtype)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tile_t=24), "tile_t must be"),
        (dict(tile_k=128), "tile_k must be"),
        (dict(accumulators=3), "accumulators must be"),
        (dict(stages=0), "stages must be"),
    ],
)
def test_tiling_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**options)


def test_refuses():
    x, w, scales = products.quantized(np.random.default_rng(5), "nvfp4", [4, 4], 8, 256, 128)

    def refused(message, w=w, **options):
        with pytest.raises(ValueError, match=message):
            _call(x, w, (4, 4), **scales | options)

    narrow = jax.tree.map(lambda leaf: leaf[:, :64] if leaf.ndim > 1 else leaf, w)
    refused("N must be a multiple of 128, .* got 64", w=narrow)
    refused("row_scale_T", row_scale_T=jnp.ones(9))
    refused("out_dtype", out_dtype=jnp.float16)
    refused("shared memory", tiling=Tiling(stages=11))
