"""The quantize kernel in interpret mode, races detected, bit for bit against `formats`. Swizzles are not seen there.

T tokens, N rows of the output, K contraction axis.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats, private_jax
from pallas_kernels.private_division import ieee_divide
from pallas_kernels.quantize import blocks, mosaic_sm100, xla
from pallas_kernels.quantize import mosaic_sm100_kernel as kernel
from pallas_kernels.quantize.mosaic_sm100 import Tiling
from tests.mutants import mutated, parameters
from tests.mutants import quantize_sm100 as mutants

# Few pseudo-threads stand for asynchronous copies: where two share one, a race between them goes unseen.
_INTERPRET = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=32)


def _rows(num_rows, depth, dtype, smallest):
    """Rows of many magnitudes, with blocks of zeros, ties, blocks far below the rest, and what is not finite."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, depth)) * 2.0 ** rng.integers(-10, 10, (num_rows, 1))
    x *= np.repeat(rng.choice([0.0, 1e-7, 1.0, 30.0], (num_rows, depth // 16)), 16, axis=1)
    x[::5, 17] = np.nan
    x[1::5, 40:42] = np.inf, -np.inf
    x[2::5, :32] = [-0.0, 7, -7, 3.5, 5, 2.5, 0.25, -0.75] * 4
    x[3::5] = np.sign(x[3::5]) * (1 + np.arange(depth) % 3) * smallest
    x[4::5, 32:64] = 1e-30
    return jnp.asarray(x, jnp.float32).astype(dtype)


def _compiled(x, format, *, num_sms=1, rule=None, **options):
    """Returns a compiled call, which takes no arguments."""
    rule = rule or formats.FORMATS[format].rules[0]

    def call(x, arrays):
        return mosaic_sm100.quantize_rows(
            x, format, rule=rule, num_sms=num_sms, interpret=_INTERPRET, **static, **arrays
        )

    static = {k: options.pop(k) for k in ("hadamard", "tiling") if k in options}
    # The program is long and runs once: optimising it would take longer.
    fast = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(call, compiler_options=fast).lower(x, options).compile()
    return lambda: compiled(x, options)


def _call(*args, **options):
    return _compiled(*args, **options)()


def _expected(x, format, *, rule=None, tiling=None, num_sms=1, **options):
    rule = rule or formats.FORMATS[format].rules[0]
    return xla.quantize_rows(x, format, rule=rule, **options)


def _same(got, expected):
    assert (got.format, got.rule, got.layout) == (expected.format, expected.rule, expected.layout)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def _case(num_rows, depth, format, dtype=jnp.bfloat16, *, gather=None, **options):
    # A global amax below 3.2e-35 counts as zero, subnormal ones too. MXFP4's codes of subnormal numbers are exact on a
    # GPU, but here XLA flushes them.
    x = _rows(num_rows, depth, dtype, smallest=1e-40 if format == "nvfp4" else 1.2e-38)
    if gather is not None:
        options["token_N"] = jnp.asarray(
            np.random.default_rng(1).integers(0, num_rows, gather), jnp.int32
        )
    if options.pop("given", False):
        rows = num_rows if gather is None else gather
        options["amax_N"] = jnp.asarray(2.0 ** np.random.default_rng(2).uniform(-2, 8, rows), "f4")
    if options.pop("draws", False):
        options["key"] = jax.random.key(3)
    return (x, format), options


@pytest.mark.parametrize(
    "args, options",
    [
        # All quarters of a tile and one row of the next; two SMs.
        (_case(129, 512, "nvfp4", tiling=Tiling(8, 2, 1), num_sms=2)),
        # Idle lanes, more slots than a row has steps.
        (_case(9, 320, "nvfp4", jnp.float32, gather=5, tiling=Tiling(32, 3, 1), given=True)),
        # A last step of one line.
        (_case(5, 1088, "nvfp4", jnp.float16, gather=2, hadamard=16, tiling=Tiling(16, 2, 1))),
        (_case(6, 640, "nvfp4", gather=3, draws=True, tiling=Tiling(8, 2, 1))),
        (_case(3, 64, "nvfp4", jnp.float32, draws=True, given=True, hadamard=16, num_sms=2)),
        (_case(2, 1152, "mxfp4", rule="rceil", tiling=Tiling(8, 1, 1))),
        (_case(4, 384, "mxfp4", jnp.float32, rule="floor", gather=9)),
        (_case(3, 256, "mxfp4", rule="even", hadamard=16)),
        (_case(4, 256, "mxfp4", jnp.float16, rule="ceil", draws=True, gather=2)),
    ],
)  # fmt: skip
def test_bits(args, options):
    _same(_call(*args, **options), _expected(*args, **options))


class Case(NamedTuple):
    """Whether a result is right: of the kernel as it was compiled, and of the one that it would be compiled to now."""

    compiled: Callable[[], bool]
    anew: Callable[[], bool]


@functools.cache
def _mutant_case(drawn):
    """A call that several steps, slots and buffers take part in."""
    if drawn:
        args, options = _case(7, 2176, "mxfp4", gather=3, draws=True, tiling=Tiling(16, 1, 1))
    else:
        args, options = _case(4, 2176, "nvfp4", gather=3, tiling=Tiling(32, 2, 1))
        args = (args[0].at[:, 40].set(jnp.nan).at[:, 64:80].set(1e-30), *args[1:])
    expected = jax.tree.leaves(_expected(*args, **options))

    def right(q):
        leaves = jax.tree.leaves(q)
        return all(np.array_equal(a, b) for a, b in zip(leaves, expected, strict=True))

    compiled = _compiled(*args, **options)
    return Case(lambda: right(compiled()), lambda: right(_call(*args, **options)))


@pytest.mark.parametrize("mutant", parameters(mutants.MUTANTS))
def test_mutants(mutant, monkeypatch):
    case = _mutant_case(mutant in mutants.DRAWN)
    if mutant in mutants.ARITHMETIC:
        monkeypatch.setattr(kernel, "blocks", mutated(blocks.__name__, mutant))
    else:
        monkeypatch.setattr(mosaic_sm100, "kernel", mutated(kernel.__name__, mutant))
    try:
        caught = None if case.anew() else "numerics"
    except Exception as error:
        private_jax.reset_interpreter()
        assert "RACE DETECTED" in str(error) or "arrier" in str(error), error
        caught = "race"
    monkeypatch.undo()
    assert caught is not None
    assert mutant.caught_by in (caught, "either")
    assert case.compiled()


@pytest.mark.parametrize("lanes, num_rows", [(8, 1), (8, 300), (16, 37), (32, 128), (32, 129)])
def test_groups_cover_every_row_once(lanes, num_rows):
    """Groups with rows come first, and the rows of all groups are those of whole tiles."""
    plan = _plan(num_rows, 2048, tiling=Tiling(lanes, 4, 1))
    rows = np.array(
        [[plan.row(g, p) for p in range(plan.rows)] for g in range(plan.all_groups)], int
    )
    assert sorted(rows.ravel()) == list(range(-(-num_rows // 128) * 128))
    assert [g for g in range(plan.all_groups) if rows[g].min() < num_rows] == list(
        range(plan.groups)
    )


def _plan(num_rows, depth, format="nvfp4", dtype=jnp.bfloat16, **options):
    rule = formats.FORMATS[format].rules[0]
    x = jax.ShapeDtypeStruct((num_rows, depth), dtype)
    return mosaic_sm100.plan_for(x, format, rule=rule, **options)


@pytest.mark.parametrize(
    "depth, lanes, last", [(2048, 32, 32), (7168, 32, 16), (2880, 16, 13), (768, 16, 12), (64, 8, 1)]
)  # fmt: skip
def test_lanes(depth, lanes, last):
    """2880 is 45 lines: 48 places on 16 lanes, 64 on 32."""
    plan = _plan(256, depth)
    assert (plan.tiling.lanes, plan.last_lanes) == (lanes, last)


@pytest.mark.parametrize("depth", [256, 768, 2048, 4096, 7168, 14336])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tilings_fit(depth, format, dtype):
    for key in (None, jax.random.key(0)):
        amax_N = None if depth <= 4096 or format == "mxfp4" else jnp.ones(256)
        plan = _plan(256, depth, format, dtype, key=key, amax_N=amax_N)
        assert plan.shared_bytes * plan.tiling.ctas_per_sm <= 227 * 1024


@pytest.mark.parametrize(
    "depth, tiling, message",
    [
        (2048, Tiling(4, 2, 1), "lanes must be"),
        (2048, Tiling(32, 0, 1), "slots"),
        (4096, Tiling(32, 1, 1), "stay in shared memory"),
        (2048, Tiling(32, 14, 1), "bytes of shared memory"),
        (65536, None, "bytes of shared memory"),
    ],
)
def test_tilings_that_do_not_fit(depth, tiling, message):
    with pytest.raises(ValueError, match=message):
        _plan(256, depth, tiling=tiling)


def test_divisions_are_rounded_once():
    rng = np.random.default_rng(5)
    a, b = (jnp.asarray(rng.uniform(1, 2, 4096), jnp.float32) for _ in range(2))
    divide = jax.jit(ieee_divide)
    np.testing.assert_array_equal(divide(a, b), np.asarray(a) / np.asarray(b))
    # Not simplified to b / 2688, which differs for a third of all b.
    twice = jax.jit(lambda b: divide(None, divide(jnp.full_like(b, 2688), b)))(b)
    np.testing.assert_array_equal(twice, np.float32(1) / (np.float32(2688) / np.asarray(b)))
    assert (twice != b * np.float32(1 / 2688)).any()
