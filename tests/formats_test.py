"""Formats against a specification in numpy and ml_dtypes: every format and rule, eager, compiled, mapped; bad input."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_spec import (
    CASES,
    F32,
    LARGE_CASES,
    STACK,
    TILES,
    VARIANTS,
    assert_same,
    assert_specified,
    cast,
    flushed,
    values,
)

from pallas_kernels import formats
from pallas_kernels.formats import block_scaled, elements

ELEMENTS = {"e2m1": elements.E2M1, "e4m3": elements.E4M3, "e5m2": elements.E5M2}


def test_every_format_and_rule_is_specified():
    assert VARIANTS == sorted(set(VARIANTS), key=VARIANTS.index)
    found = {(name, rule) for name, spec in formats.FORMATS.items() for rule in spec.rules}
    assert found == set(VARIANTS)


@pytest.mark.parametrize(("name", "rule"), VARIANTS)
def test_quantize_equals_the_specification(name, rule):
    q = formats.quantize(STACK, name, rule=rule)
    assert_specified(q, formats.dequantize(q), rule, CASES)


@pytest.mark.parametrize("name", TILES)
def test_whole_and_partial_tiles_equal_the_specification(name):
    cases = LARGE_CASES
    if name == "int4_group":  # 208 is no multiple of 32
        cases = {case: x[:, :192] for case, x in cases.items()}
    q = formats.quantize(np.stack(list(cases.values())), name)
    assert_specified(q, formats.dequantize(q), "amax", cases)


@pytest.mark.parametrize(("name", "rule"), VARIANTS)
def test_one_operation_at_a_time_gives_the_same(name, rule):
    want = formats.quantize(STACK, name, rule=rule)
    with jax.disable_jit():
        eager = formats.quantize(STACK, name, rule=rule)
        value = formats.dequantize(eager)
    assert_same((eager, value), (want, formats.dequantize(want)))


@pytest.mark.parametrize(("name", "rule"), VARIANTS)
def test_vmap_gives_the_same(name, rule):
    want = formats.quantize(STACK, name, rule=rule)
    mapped = jax.vmap(lambda matrix: formats.quantize(matrix, name, rule=rule))(STACK)
    assert_same((mapped, jax.vmap(formats.dequantize)(want)), (want, formats.dequantize(want)))


@pytest.mark.parametrize(("name", "rule"), VARIANTS)
def test_one_program_with_its_surroundings_changes_nothing(name, rule):
    # XLA may fold conversions, or move factors, when it sees both sides.
    both = jax.jit(lambda x: formats.dequantize(formats.quantize(x * 3, name, rule=rule)))
    third = flushed(STACK.clip(-1e38, 1e38))  # XLA flushes subnormals in the product with 3
    want = formats.dequantize(formats.quantize(third * F32(3), name, rule=rule))
    assert_same(both(third), want)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_bfloat16_and_float16_inputs_are_their_float32_values(name):
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.asarray(STACK).astype(dtype)
        want = formats.quantize(x.astype(jnp.float32), name)
        assert_same(formats.quantize(x, name), want)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_any_number_of_leading_axes_gives_the_same(name):
    want = formats.quantize(STACK, name)
    shape = (4, len(STACK) // 4, *STACK.shape[1:])
    found = formats.quantize(STACK.reshape(shape), name)
    assert formats.dequantize(found).shape == found.shape == shape
    found = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), found, want)
    assert_same(found, want)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8_e5m2", "fp8_tensor", "fp8_block", "int4_group"])
def test_dequantize_casts_once_at_the_end(name):
    q = formats.quantize(STACK, name)
    value = formats.dequantize(q, jnp.bfloat16)
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, formats.dequantize(q).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("name", "jit"), [("e2m1", True), ("e4m3", True), ("e5m2", True), ("e4m3", False)]
)
def test_elements_equal_ml_dtypes(name, jit):
    element = ELEMENTS[name]
    encode = jax.jit(elements.encode, static_argnums=1) if jit else elements.encode
    decode = jax.jit(elements.decode, static_argnums=1) if jit else elements.decode
    code = np.arange(2**element.bits, dtype=np.uint8)
    want = values(code, name)
    np.testing.assert_array_equal(decode(code, element), want)
    # Every value, every midpoint of neighbours, and one float32 to either side of both.
    grid = np.unique(want[np.isfinite(want)])
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, grid * F32(1.5), [1e30, 2.0**-140]])
    points = np.unique(np.concatenate([points, -points]).astype(F32))
    points = np.concatenate(
        [points, np.nextafter(points, F32(np.inf)), np.nextafter(points, F32(-np.inf))]
    )
    np.testing.assert_array_equal(encode(points, element), cast(points, name))


def test_encode_scales_float32_subnormals_exactly():
    # 3 * 2^-129 * 2^127 = 3/4 -> tie between 1/2 and 1, to even: 1.  5 * 2^-129 * 2^127 = 5/4 -> tie, to even: 1.
    x = np.array([3, 5, 7, -1], F32) * F32(2.0**-129)
    np.testing.assert_array_equal(elements.encode(x, elements.E2M1, -127), [2, 2, 4, 8])


@pytest.mark.parametrize("element", [elements.INT8, elements.INT4])
def test_integers_are_twos_complement(element):
    code = np.arange(2**element.bits, dtype=np.uint8)
    signed = np.where(code < 2 ** (element.bits - 1), code.astype(int), code - 2.0**element.bits)
    np.testing.assert_array_equal(elements.decode_integer(code, element), signed)
    # Ties to even, saturating at the symmetric limit.
    x = np.array([0.5, 1.5, -2.5, 2.51, -1, element.max_value + 9, -1e9], F32)
    limit = int(element.max_value)
    want = np.array([0, 2, -2, 3, -1, limit, -limit]) & (2**element.bits - 1)
    np.testing.assert_array_equal(elements.encode_integer(x, element), want)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "name", "options", "message"),
    [
        ((4, 40), F32, "nvfp4", {}, r"multiple of 16, got 40 \(shape \(4, 40\)\)"),
        ((4, 48), F32, "mxfp4", {}, r"multiple of 32, got 48 \(shape \(4, 48\)\)"),
        ((4, 48), F32, "int4_group", {}, r"multiple of 32, got 48 \(shape \(4, 48\)\)"),
        ((16,), F32, "fp8_block", {}, r"at least 2 axes, got shape \(16,\)"),
        ((8, 32), F32, "nvfp4_46_2d", {}, r"16 x 16 tiles, got 8 rows \(shape \(8, 32\)\)"),
        (
            (4, 32),
            F32,
            "nvfp4_46",
            {"rule": "amax"},
            "'amax' for format nvfp4_46; allowed: mse, mae",
        ),
        ((4, 32), F32, "nvfp4", {"key": 3}, "key must be None or one PRNG key, .* got 3"),
        ((4, 32), F32, "fp8_block", {"num_batch_axes": 1}, "from 0 to 0 for fp8_block .* got 1"),
        ((8, 32), F32, "nvfp4_2d", {}, r"16 x 16 tiles, got 8 rows \(shape \(8, 32\)\)"),
        ((32,), F32, "nvfp4_2d", {}, r"at least 2 axes, got shape \(32,\)"),
        ((), F32, "fp8_tensor", {}, r"at least 1 axes, got shape \(\)"),
        (
            (4, 32),
            F32,
            "nvfp8",
            {},
            "unknown format 'nvfp8'; allowed: nvfp4, nvfp4_2d, .*fp8_tensor",
        ),
        (
            (4, 32),
            F32,
            "mxfp4",
            {"rule": "round"},
            "'round' for format mxfp4; allowed: rceil, floor",
        ),
        ((4, 32), F32, "nvfp4", {"rule": "floor"}, "'floor' for format nvfp4; allowed: amax"),
        ((4, 32), np.int32, "nvfp4", {}, "float32, bfloat16 or float16, got int32"),
        ((4, 32), F32, "nvfp4", {"num_batch_axes": 2}, "from 0 to 1 .* got 2"),
    ],
)
def test_bad_input_is_one_clear_error(shape, dtype, name, options, message):
    with pytest.raises(ValueError, match=message):
        formats.quantize(np.zeros(shape, dtype), name, **options)


def test_several_keys_are_refused():
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=r"one PRNG key, .* got key<fry> of shape \(3,\)"):
        formats.quantize(np.zeros((4, 32), F32), "nvfp4", key=keys)


def test_examples_in_docstrings():
    assert doctest.testmod(block_scaled).failed == 0
