"""The model of a kernel's time: by hand, its limits, and the tilings that it chooses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, roofline, schedules, shapes
from pallas_kernels.grouped_matmul import tiles
from pallas_kernels.roofline import Limits, Product, Schedule

# 10 multiprocessors, 1 byte per second of HBM and 10 of L2 for each, 1000 flops per second for each.
SLOW = Limits(num_sms=10, hbm=1.0, l2=10.0, flops=1000.0, latency=2.0)
TILE = Schedule(rows=4, columns=8, depth=16, aligned=True, step_bytes=100, stages=4)


def test_by_hand():
    """Rows 0-5 and 6-8: blocks of 4 are {0, 1} and {1, 2}, four row tiles; 24 / 8 = 3 columns, 32 / 16 = 2 steps."""
    product = Product((6, 0, 3), 24, 32, "nvfp4", "nvfp4")
    assert TILE.row_tiles(product.sizes_E) == 4
    # 2 of 3 experts: 2 * 24 * 32 * 4.5 / 8 = 864; rows 9 * 32 * 4.5 / 8 = 162; results 9 * 24 * 2 = 432.
    assert product.hbm_bytes == 864 + 162 + 432
    found = roofline.roofline(product, TILE, SLOW)
    # 12 tiles on 10 SMs: the busiest has 2 tiles, 4 steps, each of 2 * 4 * 8 * 16 = 1024 flops.
    assert found.seconds == {
        "HBM": 1458.0,
        "L2": 12 * 2 * 100 / 100,
        "tensor": pytest.approx(4 * 1024 / 1000),
        "latency": 4 * 2.0 / 4 + 2.0,
    }
    assert found.bound == "HBM" and found.share == 1.0


def test_a_bound_that_is_not_hbm_costs_a_share():
    product = Product((6, 0, 3), 24, 32, "nvfp4", "nvfp4")
    found = roofline.roofline(product, TILE, dataclasses.replace(SLOW, hbm=1458.0))
    assert found.bound == "L2" and found.time == 24.0
    # Ideal: the larger of 1 s of HBM and 2 * 9 * 24 * 32 / 10^4 = 1.3824 s of arithmetic.
    assert found.share == pytest.approx(1.3824 / 24)


def test_two_ctas_share_a_tile():
    product = Product((40,), 8, 16, "nvfp4", "nvfp4")
    pair = dataclasses.replace(TILE, rows=8, ctas=2)
    assert roofline.roofline(product, TILE, SLOW).seconds["tensor"] == pytest.approx(1.024)
    # 5 tiles in 5 slots, twice as high, at twice the speed.
    assert roofline.roofline(product, pair, SLOW).seconds["tensor"] == pytest.approx(1.024)


def test_tiles_are_those_of_the_schedule():
    draw = np.random.default_rng(0)
    for _ in range(20):
        sizes = draw.integers(0, 300, 6) * draw.integers(0, 2, 6)
        made = tiles.schedule(np.asarray(sizes, np.int32), int(sizes.sum()) or 1, 128)
        assert schedules.of_sm100(schedules.PLAIN, "nvfp4").row_tiles(tuple(sizes)) == made.count


def test_random_sizes():
    for tokens in (1, 64, 8192):
        sizes = roofline.random_sizes(tokens, 64, 8)
        assert sum(sizes) == tokens * 8 and len(sizes) == 64
        assert tokens > 4096 or max(sizes) <= tokens  # k distinct experts for each token
    assert roofline.even(10, 4) == (3, 3, 2, 2)


def test_the_chosen_tiling_is_never_much_slower():
    for model in shapes.MODELS.values():
        for outputs, inputs in model.layers().values():
            for tokens in (1, 64, 4096):
                sizes = roofline.random_sizes(tokens, model.experts, model.k)
                product = Product(sizes, outputs, inputs, "nvfp4", "nvfp4")
                before, after = schedules.before_and_after("mosaic_sm100", product, roofline.B200)
                first, then = (
                    roofline.roofline(product, s, roofline.B200).time for _, s in (before, after)
                )
                assert then <= first


def test_prefill_takes_wide_tiles_and_decoding_plain_ones():
    deepseek = shapes.MODELS["deepseek_v3"]
    outputs, inputs = deepseek.layers()["gate_up"]

    def chosen(tokens, **options):
        sizes = roofline.random_sizes(tokens, deepseek.experts, deepseek.k)
        return schedules.choose_sm100(Product(sizes, outputs, inputs, "nvfp4", "nvfp4"), **options)

    assert chosen(8) == "128x128"
    assert chosen(65536) == "256x256, 2 CTAs"
    assert chosen(65536, collective=False) == "128x256"


def test_one_token_takes_swapped_operands():
    """Qwen3-30B's down: 8 experts' 16 tiles of 128 columns, 3 steps of 256: one tile an SM, which waits for loads."""
    product = Product((1,) * 8 + (0,) * 120, 2048, 768, "nvfp4", "nvfp4")
    before, after = schedules.before_and_after("mosaic_sm100", product, roofline.B200)
    assert (before[0], after[0]) == ("128x128", "8x128, swapped")
    seconds = [roofline.roofline(product, s, roofline.B200).time for _, s in (before, after)]
    # 3 steps of 1 us, five or ten in flight, after one to begin.
    assert seconds == pytest.approx([1e-6 + 3e-6 / 5, 1e-6 + 3e-6 / 10])


def test_the_tilings_fit():
    for name in (*schedules.SM100, *schedules.SM100_SWAPPED):
        for format in ("nvfp4", "mxfp4"):
            for dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
                schedules.sm100_tiling(name, format, dtype).check_budgets(format, dtype)


@pytest.mark.skipif(bool(aot.missing()), reason=aot.missing())
def test_the_limits_are_those_of_the_description():
    found = roofline.limits_of(aot.targets()["b200"], "float4_e2m1fn")
    for field in dataclasses.fields(Limits):
        ours, theirs = (getattr(limits, field.name) for limits in (roofline.B200, found))
        assert ours == pytest.approx(theirs), field.name
    with pytest.raises(ValueError, match="no rate for float4_e2m1fn"):
        roofline.limits_of(aot.targets()["a100"], "float4_e2m1fn")
