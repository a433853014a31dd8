"""The W4A4 Triton kernel: in Triton's interpreter against the reference, and what it refuses.

What this shows: MXFP4 goes through `tl.dot_scaled` as on the GPU. For NVFP4 the interpreter's `dot_scaled` is wrong, so
loads, masks, schedule and epilogue are tested, and another product stands for it; that it becomes a block-scaled MMA
with E4M3 scales is checked in the compiled code (pallas_kernels/verify/triton_w4a4.py), its value on no machine yet.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="the interpreter comes with triton, in the extra aot")

from mutants.triton_w4a4 import CAUGHT_BY, MUTANTS  # noqa: E402

from pallas_kernels import formats  # noqa: E402
from pallas_kernels.grouped_matmul import reference, triton_w4a4  # noqa: E402
from tests import triton_cases  # noqa: E402
from tests.triton_cases import CASES, FORMATS, TOLERANCE, error  # noqa: E402

NAMES = tuple(triton_cases.QUANTIZED_CASES)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the interpreter computed, by name."""
    return triton_cases.interpreted("triton_w4a4", tmp_path_factory.mktemp("triton"))


@functools.cache
def expected(name, format):
    """The definition of the numerics, on the values that the codes stand for, in float32."""
    inputs, x = triton_cases.quantized(CASES[name], format)
    return np.asarray(
        reference.grouped_matmul(
            formats.dequantize(x),
            inputs.w,
            inputs.sizes_E,
            inputs.bias_EN,
            inputs.row_scale_T,
            jnp.float32,
        )
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(results, name, format):
    found = results[f"{format}/{name}"]
    bound = 0 if CASES[name].values == "integers" else TOLERANCE
    assert error(found, expected(name, format)) <= bound
    # NaN marks what the kernel left unwritten, so this is what it wrote.
    assert (found[sum(CASES[name].sizes) :] == 0).all()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(results, mutant):
    worst = max(
        error(results[f"mutant/{mutant.name}/{format}/{name}"], expected(name, format))
        for format, name in CAUGHT_BY
    )
    assert worst > 100 * TOLERANCE


def test_the_kernel_passes_after_the_mutants(results):
    for format, name in CAUGHT_BY:
        found = results[f"after mutants/{format}/{name}"]
        np.testing.assert_array_equal(found, results[f"{format}/{name}"])


def operands(T=32, N=48, K=128, E=3, x="nvfp4", w="nvfp4"):
    """Shapes only."""

    def packed(shape, format):
        array = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(lambda a: formats.quantize(a, format), array)

    return packed((T, K), x), packed((E, N, K), w), jax.ShapeDtypeStruct((E,), jnp.int32)


def shape_of(x, w, sizes, capability=(12, 0), **options):
    product = functools.partial(
        triton_w4a4.grouped_matmul_codes, capability=capability, out_dtype=jnp.bfloat16, **options
    )
    return jax.eval_shape(product, x, w, sizes)


@pytest.mark.parametrize("format", FORMATS)
def test_is_a_call_of_one_shape(format):
    pytest.importorskip("jax_triton")
    y = shape_of(*operands(x=format, w=format))
    assert (y.shape, y.dtype) == ((32, 48), jnp.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "capability", "message"),
    [
        ({"x": "mxfp4"}, (12, 0), "one kind of scale, got mxfp4 and nvfp4"),
        ({"x": "mxfp8_e4m3", "w": "mxfp4"}, (12, 0), "in 4 bits"),
        ({"w": "int4_group"}, (12, 0), "NVFP4 or MXFP4, got int4_group"),
        ({}, (10, 0), "compute capability 12.x, got 10.0"),
    ],
)
def test_refuses_what_it_cannot_run(arguments, capability, message):
    with pytest.raises(NotImplementedError, match=message):
        shape_of(*operands(**arguments), capability=capability)


def test_refuses_what_does_not_fit():
    x, w, sizes = operands()
    with pytest.raises(ValueError, match=r"x must be \(T, K = 128\)"):
        shape_of(operands(K=64)[0], w, sizes)
    tiled = jax.eval_shape(lambda q: formats.arranged(q, "tcgen05"), x)
    with pytest.raises(ValueError, match="x must have linear scales"):
        shape_of(tiled, w, sizes)
    with pytest.raises(ValueError, match="must have scales"):
        wide = jax.ShapeDtypeStruct((32, 9), jnp.uint8)
        shape_of(dataclasses.replace(x, scales=wide), w, sizes)


def test_default_tilings():
    found = [triton_w4a4.default_tiling(rows, 4096, 4096, (12, 0)) for rows in (1, 40, 500)]
    assert [tiling.block_m for tiling in found] == [16, 64, 128]
