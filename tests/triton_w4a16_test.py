"""The weight-only Triton kernel: in Triton's interpreter against the reference, its schedule, what it refuses."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton", reason="the interpreter comes with triton, in the extra aot")

from mutants.triton_w4a16 import CAUGHT_BY, MUTANTS  # noqa: E402

from pallas_kernels import formats  # noqa: E402
from pallas_kernels.grouped_matmul import reference, triton_launch, triton_w4a16  # noqa: E402
from tests import triton_cases  # noqa: E402
from tests.triton_cases import BYTES, CASES, FLOAT16_CASES, FORMATS, TOLERANCE, error  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the interpreter computed, by name."""
    return triton_cases.interpreted("triton_w4a16", tmp_path_factory.mktemp("triton"))


@functools.cache
def expected(case, format):
    """The definition of the numerics, in float32."""
    inputs = triton_cases.make(case, format)
    y_TN = reference.grouped_matmul(
        inputs.x_TK,
        inputs.w,
        jnp.minimum(jnp.cumsum(inputs.sizes_E), case.rows)
        - jnp.minimum(jnp.cumsum(inputs.sizes_E) - inputs.sizes_E, case.rows),
        inputs.bias_EN,
        inputs.row_scale_T,
        jnp.float32,
    )
    return np.asarray(y_TN)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(results, name, format):
    found, wanted = results[f"{format}/{name}"], expected(CASES[name], format)
    assert error(found, wanted) <= (0 if CASES[name].values == "integers" else TOLERANCE)
    # NaN marks what the kernel left unwritten, so this is what it wrote.
    assert (found[sum(CASES[name].sizes) :] == 0).all()


@pytest.mark.parametrize("name", FLOAT16_CASES)
def test_takes_float16(results, name):
    case = FLOAT16_CASES[name]
    found, wanted = results[f"float16/{name}"], expected(case, "nvfp4")
    assert error(found, wanted) <= (0 if case.values == "integers" else TOLERANCE)


def test_a_nan_stays_in_its_row_and_column(results):
    for format in FORMATS:
        column = np.isnan(results[f"{format}/nan scale"])
        assert column[5:19, triton_cases.NAN_OUTPUT].all()
        assert column.sum() == 14
        row = np.isnan(results[f"{format}/nan row"])
        assert row[triton_cases.NAN_ROW].all()
        assert row.sum() == row.shape[1]
        assert not np.isnan(results[f"{format}/nan tail"]).any()


def decoded_e2m1():
    return triton_cases.every_code().view(ml_dtypes.float4_e2m1fn).astype(np.float64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_code_times_every_e4m3_scale_is_exact(results, dtype):
    with np.errstate(invalid="ignore"):
        scale = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        wanted = (scale[:, None] * decoded_e2m1()).astype(np.float32)
    found = results[f"decoded/16/{dtype}"]
    assert np.isnan(found[[0x7F, 0xFF]]).all() and np.isnan(found).sum() == 2 * 32
    np.testing.assert_array_equal(found, wanted)
    # float32 stood in for bfloat16: no product has bits that it would have to round away.
    kept = found.astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(kept, found)


def test_every_code_times_every_e8m0_scale_is_exact(results):
    exponent = BYTES.astype(np.float64) - 127
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = (2.0 ** exponent[:, None] * decoded_e2m1()).astype(np.float32)
        wanted[255] = np.nan
    found = results["decoded/32/bfloat16"]
    np.testing.assert_array_equal(found, wanted)
    # Subnormals (2^-127 for byte 0) are kept, and what bfloat16 overflows float32 overflows too.
    assert found[0, 1] == 2.0**-128 and np.isinf(found[254, 7])
    np.testing.assert_array_equal(found.astype(ml_dtypes.bfloat16).astype(np.float32), found)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(results, mutant):
    worst = max(
        error(results[f"mutant/{mutant.name}/{format}/{name}"], expected(CASES[name], format))
        for format, name in CAUGHT_BY
    )
    assert worst > 100 * TOLERANCE


def test_the_kernel_passes_after_the_mutants(results):
    for format, name in CAUGHT_BY:
        found = results[f"after mutants/{format}/{name}"]
        np.testing.assert_array_equal(found, results[f"{format}/{name}"])


schedule = jax.jit(triton_launch.schedule, static_argnums=(1, 2))


def covered(sizes, num_rows, tile_rows):
    """Whose every row is by the schedule, and how often it is covered."""
    expert_I, block_I, first_I, rows_I = np.asarray(
        schedule(np.asarray(sizes, np.int32), num_rows, tile_rows)
    )
    owner_T, times_T = np.full(num_rows, -1), np.zeros(num_rows, int)
    for expert, block, first, rows in zip(expert_I, block_I, first_I, rows_I, strict=True):
        assert 0 <= first and first + rows <= tile_rows or rows == 0
        for row in range(block * tile_rows + first, block * tile_rows + first + rows):
            owner_T[row], times_T[row] = expert, times_T[row] + 1
    return owner_T, times_T


@pytest.mark.parametrize("num_rows", [20, 27])
def test_the_schedule_covers_every_row_once(num_rows):
    """All patterns of empty groups, whose rows fill blocks of 4, or share them, or lie beyond the groups."""
    for unit, pattern in itertools.product((1, 4, 5), itertools.product((0, 1), repeat=4)):
        sizes = unit * np.array(pattern)
        owner_T, times_T = covered(sizes, num_rows, 4)
        wanted_T = np.repeat(np.arange(5), (*sizes, num_rows - sizes.sum()))
        np.testing.assert_array_equal(owner_T, wanted_T)
        assert (times_T == 1).all()


def test_the_schedule_ends_where_the_rows_do():
    owner_T, times_T = covered((3, 100, 2), 10, 4)
    np.testing.assert_array_equal(owner_T, [0] * 3 + [1] * 7)
    assert (times_T == 1).all()


def operands(T=32, N=48, K=128, E=3, format="nvfp4", dtype=jnp.bfloat16):
    """Shapes only."""
    w = jax.eval_shape(
        lambda w_ENK: formats.quantize(w_ENK, format), jax.ShapeDtypeStruct((E, N, K), jnp.float32)
    )
    return (
        jax.ShapeDtypeStruct((T, K), dtype),
        w,
        jax.ShapeDtypeStruct((E,), jnp.int32),
    )


def shape_of(x, w, sizes, capability=(9, 0), **options):
    product = triton_w4a16.grouped_matmul_codes
    return jax.eval_shape(lambda *a: product(*a, capability=capability, **options), x, w, sizes)


def test_is_a_call_of_one_shape():
    pytest.importorskip("jax_triton")
    y = shape_of(*operands())
    assert (y.shape, y.dtype) == ((32, 48), jnp.bfloat16)
    assert shape_of(*operands(T=0), out_dtype=jnp.float32).shape == (0, 48)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"dtype": jnp.float32}, {}, "bfloat16 or float16 activations, got float32"),
        ({"dtype": jnp.float16, "format": "mxfp4"}, {}, "does not hold their scales"),
        ({"format": "mxfp8_e4m3"}, {}, "NVFP4 or MXFP4, got mxfp8_e4m3"),
        ({}, {"capability": (7, 5)}, "compute capability 8.0 to 12.x, got 7.5"),
    ],
)
def test_refuses_what_it_cannot_run(arguments, options, message):
    with pytest.raises(NotImplementedError, match=message):
        shape_of(*operands(**arguments), **options)


def test_refuses_what_does_not_fit():
    x, w, sizes = operands()
    with pytest.raises(ValueError, match=r"x must be \(T, K = 128\)"):
        shape_of(jax.ShapeDtypeStruct((32, 64), jnp.bfloat16), w, sizes)
    with pytest.raises(ValueError, match=r"group_sizes_E must have shape \(3,\)"):
        shape_of(x, w, jax.ShapeDtypeStruct((4,), jnp.int32))
    with pytest.raises(ValueError, match="out_dtype must be"):
        shape_of(x, w, sizes, out_dtype=jnp.int32)
    with pytest.raises(ValueError, match="must have scales"):
        wide = jax.ShapeDtypeStruct((3, 48, 9), jnp.uint8)
        shape_of(x, dataclasses.replace(w, scales=wide), sizes)
    tiled = jax.eval_shape(lambda q: formats.arranged(q, "tcgen05"), w)
    with pytest.raises(ValueError, match="tcgen05 scales"):
        shape_of(x, tiled, sizes)
    with pytest.raises(ValueError, match="block_n must be a power of two"):
        triton_w4a16.Tiling(16, 96, 64, 4, 3)


def test_needs_the_extra(monkeypatch):
    monkeypatch.setattr(triton_launch, "_PACKAGES", ("triton", "no_such_package"))
    with pytest.raises(NotImplementedError, match=r"no_such_package.*moelab\[aot\]"):
        shape_of(*operands())


def test_default_tilings():
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        decode = triton_w4a16.default_tiling(2, 4096, 4096, capability)
        prefill = triton_w4a16.default_tiling(500, 4096, 4096, capability)
        assert (decode.block_m, prefill.block_m) == (16, 128)
