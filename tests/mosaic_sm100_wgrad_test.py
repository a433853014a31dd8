"""Weight gradients with FP4 operands on data-centre Blackwell, in interpret mode with race detection.

T rows, N outputs, K inputs, E experts, V units of W = 256 tokens.
"""

import functools
import itertools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats, private_jax
from pallas_kernels.grouped_matmul import MatmulPrecision, reference, transposed_operands
from pallas_kernels.grouped_matmul import mosaic_sm100_wgrad as wgrad
from tests import mutants
from tests.mutants.mosaic_sm100_wgrad import MODULE, MUTANTS

E, N, K, V, W = 4, 128, 256, 4, wgrad.UNIT
SIZES = (512, 0, 256, 0)  # 6 k-steps in 8 tiles; the last unit is nobody's
TILING = wgrad.Tiling(stages=2, epilogue_n=64)


@functools.cache
def kernel(module=wgrad, out_dtype=jnp.float32, tiling=TILING, num_sms=2):
    @jax.jit
    def run(dy, x, sizes, scale):
        dw = module.weight_gradient_codes(
            *(dy, x, sizes),
            expert_scale_E=scale,
            out_dtype=out_dtype,
            tiling=tiling,
            num_sms=num_sms,
            interpret=plgpu.InterpretGPUParams(detect_races=True),
        )
        return dw.astype(jnp.float32)

    return lambda dy, x, sizes, scale: np.asarray(run(dy, x, jnp.array(sizes, jnp.int32), scale))


@functools.cache
def integers(format, columns, seed):
    """Codes and power-of-two scales, linear, and the values that they stand for: (V W, columns)."""
    rng = np.random.default_rng(seed)
    block = formats.FORMATS[format].block
    code = rng.choice([0, 2, 4, 5, 6, 7, 10, 12, 13, 14, 15], (V, columns, W)).astype(np.uint8)
    exponent = rng.integers(0, 3, (V, columns, W // block))
    bias, shift = (7, 3) if format == "nvfp4" else (127, 0)
    scales = ((exponent + bias) << shift).astype(np.uint8)
    rule = formats.FORMATS[format].rules[0]
    amax = jnp.full(V, 2688.0) if format == "nvfp4" else None
    q = formats.BlockScaled(
        formats.pack(jnp.asarray(code)), jnp.asarray(scales), amax, format, rule
    )
    return q, np.asarray(transposed_operands.values(q), np.int64)


def exact(format, sizes, scale, outputs=N, inputs=K):
    """The weight gradient in integers: (E, N, K)."""
    (_, dy), (_, x) = integers(format, outputs, 0), integers(format, inputs, 1)
    ends = np.cumsum(sizes)
    rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return np.stack([int(s) * (dy[r].T @ x[r]) for r, s in zip(rows, scale, strict=True)])


@pytest.mark.parametrize(
    "format, out_dtype", [("nvfp4", jnp.float32), ("mxfp4", jnp.float32), ("nvfp4", jnp.bfloat16)]
)
def test_small_integers_are_exact(format, out_dtype):
    scale = np.array([1, 2, 4, 8])
    want = exact(format, SIZES, scale)
    assert np.abs(want).max() < 2**24  # float32 holds every partial sum
    dy, x = integers(format, N, 0)[0], integers(format, K, 1)[0]
    got = kernel(out_dtype=out_dtype)(dy, x, SIZES, jnp.asarray(scale, jnp.float32))
    np.testing.assert_array_equal(got, np.asarray(jnp.asarray(want, out_dtype), np.float32))


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 256, 512, 256),  # the first group is empty; every unit is somebody's
        (0, 0, 0, 1024),
        (0, 0, 0, 0),
        (512, 512, 512, 512),  # more than there is: groups end with the units
    ],
)
def test_an_empty_group_is_exactly_zero(sizes):
    one = jnp.ones(E)
    dy, x = integers("nvfp4", N, 0)[0], integers("nvfp4", K, 1)[0]
    got = kernel()(dy, x, sizes, one)
    np.testing.assert_array_equal(got, exact("nvfp4", sizes, [1] * E))
    assert not np.any(got[np.diff(np.minimum(np.cumsum((0, *sizes)), V * W)) == 0])


@pytest.mark.parametrize(
    "tiling, num_sms",
    [
        (wgrad.Tiling(tile_n=256, accumulators=1, stages=3, epilogue_n=32), 1),
        (wgrad.Tiling(stages=1, epilogue_n=64, group_order=2), 3),
    ],
)
def test_tilings_agree(tiling, num_sms):
    dy, x = integers("nvfp4", 256, 0)[0], integers("nvfp4", K, 1)[0]
    got = kernel(tiling=tiling, num_sms=num_sms)(dy, x, SIZES, jnp.ones(E))
    np.testing.assert_array_equal(got, exact("nvfp4", SIZES, [1] * E, outputs=256))


T = 300
PRECISIONS = {
    "nvfp4": MatmulPrecision(x="nvfp4", dy="nvfp4", hadamard=16, rounding="stochastic"),
    "nvfp4_46": MatmulPrecision(x="nvfp4_46", dy="nvfp4"),
    "mxfp4": MatmulPrecision(x="mxfp4", dy="mxfp4", hadamard=16, rounding="stochastic"),
}


@functools.partial(jax.jit, static_argnums=3)
def operands(dy, x, sizes, precision):
    """Codes for the kernel, padded sizes and scales; and the reference on the values of the smallest units."""
    layout = transposed_operands.units(sizes, T, transposed_operands.smallest_unit(precision))
    key = jax.random.key(7) if precision.needs_key else None
    dy = transposed_operands.quantize(dy, layout, precision, precision.dy, None, key)
    x = transposed_operands.quantize(x, layout, precision, precision.x)
    want = reference.weight_gradient(
        transposed_operands.values(dy), transposed_operands.values(x), layout.sizes_E
    )
    (dy, wide), (x, _) = (transposed_operands.widen(q, layout.sizes_E, W) for q in (dy, x))
    return dy, x, wide, transposed_operands.expert_scale(dy, x, wide), want


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("nvfp4", (0, 38, 257, 0)),
        ("nvfp4", (1, 0, 0, 290)),
        ("nvfp4_46", (100, 0, 1, 0)),
        ("mxfp4", (0, 255, 1, 40)),
    ],
)
def test_quantized_operands_against_the_reference(name, sizes):
    dy, x = (jax.random.normal(jax.random.key(i), (T, n)) for i, n in ((0, 128), (1, 128)))
    # Experts of very different magnitudes: each has its own global scale.
    dy = dy * jnp.repeat(jnp.array([1.0, 1e-4, 1e3, 1.0, 1.0]), T // 5)[:, None]
    *args, want = operands(dy, x, jnp.array(sizes), PRECISIONS[name])
    got = kernel()(args[0], args[1], tuple(args[2].tolist()), args[3])
    # Products are exact in both; sums of at most 257 of them differ in order.
    size = np.abs(want).max(axis=(1, 2), keepdims=True)
    assert np.all(np.abs(got - want) <= 2e-6 * size)
    assert not np.any(got[np.array(sizes) == 0]) and np.all(size[np.array(sizes) > 0] > 0)


def test_a_nonfinite_gradient_stays_visible():
    dy = jax.random.normal(jax.random.key(0), (T, 128)).at[60, 5].set(jnp.nan)
    x = jax.random.normal(jax.random.key(1), (T, 128))
    *args, want = operands(dy, x, jnp.array([0, 38, 257, 0]), PRECISIONS["nvfp4"])
    got = kernel()(args[0], args[1], tuple(args[2].tolist()), args[3])
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(got[2, 5]).all() and np.isnan(got).sum() == 128


def test_no_units_give_zeros():
    q = formats.BlockScaled(
        *(jnp.zeros((0, 128, n), jnp.uint8) for n in (128, 16)), None, "nvfp4", "amax"
    )
    assert not np.any(kernel()(q, q, (0, 0), jnp.ones(2)))


def test_the_schedule_shares_steps_evenly():
    schedule = jax.jit(wgrad.schedule, static_argnums=1)
    rng = np.random.default_rng(0)
    cases = [rng.multinomial(60, rng.dirichlet(np.full(8, 0.5))) for _ in range(20)]
    cases += [5 * np.array(pattern) for pattern in itertools.product([0, 1], repeat=8)]
    for units in cases:
        work = jax.device_get(schedule(jnp.asarray(units * W, jnp.int32), 60))
        assert sorted(work.expert_E) == list(range(8)) and work.count == 8
        np.testing.assert_array_equal(work.units_E, units[work.expert_E])
        np.testing.assert_array_equal(work.units_E, -np.sort(-units))
        np.testing.assert_array_equal(work.first_unit_E, (np.cumsum(units) - units)[work.expert_E])
        steps = np.repeat(work.units_E, 12)  # tiles in the order in which SMs take them
        for num_sms in (5, 13):
            loads = [steps[sm::num_sms].sum() for sm in range(num_sms)]
            assert max(loads) - min(loads) <= units.max()


GOOD = dict(
    dy=integers("nvfp4", N, 0)[0], x=integers("nvfp4", K, 1)[0], sizes=jnp.zeros(E, jnp.int32)
)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(x=integers("mxfp4", K, 1)[0]), "scales of one kind, got nvfp4 dy and mxfp4 x"),
        (
            dict(x=formats.quantize(jnp.ones((V, K, W)), "mxfp8_e4m3")),
            "got nvfp4 dy and mxfp8_e4m3 x",
        ),
        (dict(x=integers("nvfp4", 192, 1)[0]), "K of tile_n = 128, got N = 128 and K = 192"),
        (dict(x=formats.quantize(jnp.ones((V, K, 128)), "nvfp4")), r"\(4, 256, 128\)"),
        (dict(x=formats.quantize(jnp.ones((1, K, W)), "nvfp4")), r"\(1, 256, 256\)"),
        (dict(sizes=jnp.zeros(E)), r"group_sizes_padded_E must be int32 \(E,\), got float32"),
        (dict(scale=jnp.ones(3)), r"expert_scale_E must be float32 \(E,\), got float32 \(3,\)"),
        (dict(out_dtype=jnp.float16), "out_dtype must be float32 or bfloat16, got float16"),
        (dict(tiling=wgrad.Tiling(tile_k=512)), "needs tile_k = 256"),
        (dict(tiling=wgrad.Tiling(collective=True)), "collective = False"),
        (dict(tiling=wgrad.Tiling(stages=9)), "bytes of shared memory"),
        (dict(num_sms=0), "num_sms must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(changed, message):
    given = (
        GOOD | dict(scale=jnp.ones(E), out_dtype=jnp.float32, tiling=TILING, num_sms=1) | changed
    )
    with pytest.raises(ValueError, match=message):
        wgrad.weight_gradient_codes(
            *(given["dy"], given["x"], given["sizes"]),
            expert_scale_E=given["scale"],
            **{name: given[name] for name in ("out_dtype", "tiling", "num_sms")},
        )


MUTANT_SIZES = (
    256,
    0,
    256,
    512,
)  # two experts tie, one has more steps, one none: four tiles on one SM


def mutant_result(module):
    dy, x = integers("nvfp4", N, 0)[0], integers("nvfp4", N, 1)[0]
    return kernel(module, num_sms=1)(dy, x, MUTANT_SIZES, jnp.array([1.0, 2.0, 4.0, 8.0]))


@pytest.mark.parametrize("mutant", mutants.parameters(MUTANTS))
def test_mutants_are_caught(mutant):
    want = exact("nvfp4", MUTANT_SIZES, [1, 2, 4, 8], inputs=N)
    try:
        wrong = np.any(mutant_result(mutants.mutated(MODULE, mutant)) != want)
        caught = "numerics" if wrong else "nothing"
    except Exception as error:
        private_jax.reset_interpreter()
        assert "RACE DETECTED" in str(error) or "arrier" in str(error), error
        caught = "race"
    assert caught == mutant.caught_by or (caught != "nothing" and mutant.caught_by == "either")
    np.testing.assert_array_equal(mutant_result(wgrad), want)
