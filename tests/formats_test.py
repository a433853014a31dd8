"""Formats against a specification in numpy and ml_dtypes, written from the definitions and not from the library."""

import doctest
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from pallas_kernels import formats
from pallas_kernels.formats import block_scaled, elements

F32 = np.float32
ROWS, COLUMNS = 16, 64  # of each matrix of CASES
DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
ELEMENTS = {"e2m1": elements.E2M1, "e4m3": elements.E4M3, "e5m2": elements.E5M2}
LARGEST = {"e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
MX = {"mxfp4": "e2m1", "mxfp8_e4m3": "e4m3", "mxfp8_e5m2": "e5m2"}
NVFP4 = {"nvfp4": 448.0, "nvfp4_2d": 448.0, "nvfp4_46": 256.0}
MX_RULES = ("floor", "rceil", "even", "ceil")
VARIANTS = [(name, None) for name in (*NVFP4, "fp8_channel", "fp8_tensor")]
VARIANTS += [(name, rule) for name in MX for rule in MX_RULES]


# --- the specification ----------------------------------------------------------------------------


def cast(x, element):
    """Codes of x, rounded to nearest even and saturated: ml_dtypes gives NaN above the range of E4M3."""
    clipped = np.clip(x.astype(F32), -LARGEST[element], LARGEST[element])
    return clipped.astype(DTYPES[element]).view(np.uint8)


def values(code, element):
    return code.view(DTYPES[element]).astype(F32)


def expand(scale, block):
    return np.repeat(scale, block, axis=-1)


def nvfp4_candidate(x, ideal, decode):
    """Codes, scale bytes and values in units of the global scale, in the order of operations of Transformer Engine."""
    scale = cast(ideal, "e4m3")
    step = values(scale, "e4m3") * decode
    scale = np.where(step < F32(2.0**-124), np.uint8(0), scale)
    step = np.where(scale == 0, F32(np.inf), step)
    code = cast(x * expand(F32(1) / step, 16), "e2m1")
    return code, scale, values(code, "e2m1") * expand(values(scale, "e4m3"), 16)


def spec_nvfp4(x, name):
    """A list of admissible (codes, scales, values) for one matrix: two where 4/6 is undecided."""
    bound = NVFP4[name]
    amax = np.abs(x).max()
    block_amax = np.abs(x).reshape(ROWS, -1, 16).max(-1)
    if name == "nvfp4_2d":
        tile = np.abs(x).reshape(-1, 16, COLUMNS // 16, 16).max((1, 3))
        block_amax = np.repeat(tile, 16, axis=0)
    live = (
        amax >= 6 * bound * 2.0**-126
    )  # else the global scale is subnormal and the matrix counts as zero
    encode = F32(6 * bound) / amax if live else F32(0)
    decode = F32(1) / encode if live else F32(0)
    ideal = block_amax * (encode * (F32(1) / F32(6)))
    g = amax * (F32(1) / F32(6 * bound))
    six = nvfp4_candidate(x, ideal, decode)
    if name != "nvfp4_46":
        return [(*six[:2], six[2] * g)]
    four = nvfp4_candidate(x, ideal * F32(1.5), decode)

    def error(candidate):
        difference = candidate[2].astype(np.float64) * g.astype(np.float64) - x
        return (difference**2).reshape(ROWS, -1, 16).sum(-1)

    # Errors in float64. Differences at the level of float32 rounding may go either way.
    e6, e4 = error(six), error(four)
    slack = 1e-5 * np.maximum(e6, e4) + 1e-11 * (block_amax.astype(np.float64) ** 2)
    results = []
    for use_four in (e4 < e6 - slack, e4 <= e6 + slack):
        wide = expand(use_four, 16)
        code, value = np.where(wide, four[0], six[0]), np.where(wide, four[2], six[2])
        results.append((code, np.where(use_four, four[1], six[1]), value * g))
    assert (e4 < e6).any() or amax < 1e-30 or amax > 1e30 or (np.abs(x) > 0).mean() < 0.9
    return results


def spec_mx(x, name, rule):
    """The MX specification in float64, where every scaled value is exact."""
    element = MX[name]
    largest, mantissa_bits = LARGEST[element], {"e2m1": 1, "e4m3": 3, "e5m2": 2}[element]
    amax = np.abs(x.astype(np.float64)).reshape(ROWS, -1, 32).max(-1)
    floor = np.frexp(amax)[1] - 1
    fraction = amax / np.ldexp(1.0, floor)  # in [1, 2), or 0
    emax = int(np.floor(np.log2(largest)))
    up = {
        "floor": np.zeros_like(floor),
        "rceil": amax > largest * np.ldexp(1.0, floor - emax),
        "even": np.rint(fraction * 2**mantissa_bits) >= 2 ** (mantissa_bits + 1),
        "ceil": fraction > 1,
    }[rule]
    exponent = np.where(amax == 0, -127, np.clip(floor - emax + up, -127, 127))
    code = cast(x * expand(np.ldexp(1.0, -exponent), 32), element)
    with np.errstate(over="ignore"):  # see the infinity in the module's docstring
        value = (values(code, element) * expand(np.ldexp(1.0, exponent), 32)).astype(F32)
    return [(code, (exponent + 127).astype(np.uint8), value)]


def spec_fp8(x, name):
    amax = (
        np.abs(x).max(-1, keepdims=True) if name == "fp8_channel" else np.abs(x).max(keepdims=True)
    )
    scale = amax * (F32(1) / F32(448))
    scale = np.where(scale < F32(2.0**-116), F32(0), scale)
    reciprocal = np.where(scale > 0, F32(1) / np.where(scale > 0, scale, F32(1)), F32(0))
    code = cast(x * reciprocal, "e4m3")
    return [
        (code, scale[:, 0] if name == "fp8_channel" else scale[0, 0], values(code, "e4m3") * scale)
    ]


def specification(x, name, rule):
    if name in NVFP4:
        return spec_nvfp4(x, name)
    return spec_mx(x, name, rule or "rceil") if name in MX else spec_fp8(x, name)


# --- inputs ---------------------------------------------------------------------------------------


def make_cases():
    """Named finite matrices [ROWS, COLUMNS] that are meant to hurt."""
    rng = np.random.default_rng(0)
    shape = (ROWS, COLUMNS)
    normal = rng.standard_normal(shape)
    sign = rng.choice([-1.0, 1.0], shape)
    midpoint = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5])
    ties = rng.choice(midpoint, shape)
    ties[:, ::16] = 6.0  # every block's largest value, so that scales are exact
    scaled_ties = np.array(ties * np.repeat(2.0 ** rng.integers(-3, 4, (ROWS, 4)), 16, axis=1), F32)
    holes = normal.copy()
    holes[::2, 16:48] = 0.0
    outlier = normal.copy()
    outlier[3, 5] = 1e4
    subnormal = normal * 2.0**-100
    subnormal[:, 1::2] = 2.0**-127 * rng.integers(1, 8, (ROWS, COLUMNS // 2)) / 4
    one = np.zeros(shape)
    one[7, 33] = -0.37
    cases = {
        "normal": normal,
        "weights": 0.02 * normal,
        "gradients": 1e-6 * normal,
        "student": rng.standard_t(3, shape),
        "outlier": outlier,
        "powers_of_two": sign * 2.0 ** rng.integers(-12, 12, shape),
        "wide": sign * np.exp(rng.uniform(-40, 40, shape)),
        "ties": sign * ties * 448,  # amax 2688: the global scale is 1
        "scaled_ties": sign * scaled_ties * 7 * 2.0**-20,
        "above_ties": np.nextafter(F32(448 * ties), F32(np.inf)),
        "below_ties": np.nextafter(F32(448 * ties), F32(0)),
        "ties_at_any_scale": sign * ties * 0.0123,
        "bfloat16": normal.astype(ml_dtypes.bfloat16),
        "integers": rng.integers(-9, 10, shape),
        "zeros": np.zeros(shape),
        "zero_blocks": holes,
        "one_value": one,
        "subnormals": subnormal,
        "only_subnormals": 2.0**-130 * normal,
        "tiny": 1e-30 * normal,
        "huge": 8e37 * normal.clip(-4, 4),
        "largest": np.full(shape, np.finfo(F32).max) * np.where(normal > 0, 1.0, 0.3),
        "smallest_normal": np.full(shape, 2.0**-126) * rng.integers(1, 12, shape),
    }
    # Magnitudes at random: every amax is another chance for a rewritten division to show.
    for i, exponent in enumerate(rng.uniform(-28, 36, 41)):
        cases[f"magnitude_{i}"] = rng.standard_normal(shape) * 10.0**exponent
    return {name: np.asarray(x, F32) for name, x in cases.items()}


CASES = make_cases()
STACK = np.stack(list(CASES.values()))


def flushed(x):
    """Subnormal results become zero, as XLA's CPU backend makes them; and -0 becomes 0."""
    return np.where(np.abs(x) < 2.0**-126, F32(0), x)


def logical_codes(q):
    codes = formats.unpack(q.codes) if formats.FORMATS[q.format].element.bits == 4 else q.codes
    return np.asarray(codes)


def differences(q, value, x, name, rule):
    """How many codes, scales and dequantized values of one matrix differ from the specification."""
    code, scale, value = logical_codes(q), np.asarray(q.scales), np.asarray(value)
    counts = []
    for want_code, want_scale, want_value in specification(x, name, rule):
        # Codes below a zero scale mean nothing; zero codes are what we promise there.
        dead = expand(want_scale == 0, 16) if name in NVFP4 else np.zeros_like(code, bool)
        magnitude = 7 if formats.FORMATS[name].element.bits == 4 else 127
        wrong_code = np.where(dead, code & magnitude, code ^ want_code) != 0
        wrong_value = flushed(value) != flushed(np.where(dead, F32(0), want_value))
        counts.append((wrong_code, scale != want_scale, wrong_value))
    if len(counts) == 2:  # 4/6: each block must agree with one of the admissible choices
        blocks = [[w.reshape(ROWS, 4, -1).any(-1) for w in wrong] for wrong in counts]
        agrees = [~(c | s | v) for c, s, v in blocks]
        return (int((~(agrees[0] | agrees[1])).sum()),)
    return tuple(int(wrong.sum()) for wrong in counts[0])


def assert_specified(q, value, name, rule):
    pick = lambda i: jax.tree.map(lambda leaf: np.asarray(leaf)[i], q)  # noqa: E731
    found = {
        case: differences(pick(i), np.asarray(value)[i], x, name, rule)
        for i, (case, x) in enumerate(CASES.items())
    }
    assert {case: count for case, count in found.items() if any(count)} == {}


# --- bit-exactness --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rule"), VARIANTS)
def test_quantize_equals_the_specification(name, rule):
    q = formats.quantize(STACK, name, rule=rule)
    assert_specified(q, formats.dequantize(q), name, rule)


@pytest.mark.parametrize("name", ["nvfp4_46", "mxfp4"])
def test_one_operation_at_a_time_gives_the_same(name):
    want = formats.quantize(STACK, name)
    with jax.disable_jit():
        eager = formats.quantize(STACK, name)
        value = formats.dequantize(eager)
    jax.tree.map(np.testing.assert_array_equal, eager, want)
    np.testing.assert_array_equal(value, formats.dequantize(want))


@pytest.mark.parametrize("name", ["nvfp4_46", "nvfp4_2d", "fp8_tensor"])
def test_vmap_gives_the_same(name):
    want = formats.quantize(STACK, name)
    mapped = jax.vmap(lambda matrix: formats.quantize(matrix, name))(STACK)
    jax.tree.map(np.testing.assert_array_equal, mapped, want)
    np.testing.assert_array_equal(jax.vmap(formats.dequantize)(want), formats.dequantize(want))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_one_program_with_its_surroundings_changes_nothing(name):
    # XLA may fold conversions, or move factors, when it sees both sides.
    both = jax.jit(lambda x: formats.dequantize(formats.quantize(x * 3, name)))
    third = STACK.clip(-1e38, 1e38)
    want = formats.dequantize(formats.quantize(third * F32(3), name))
    np.testing.assert_array_equal(both(third), want)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_bfloat16_input_is_its_float32_value(name):
    x = jnp.asarray(STACK).astype(jnp.bfloat16)
    want = formats.quantize(x.astype(jnp.float32), name)
    jax.tree.map(np.testing.assert_array_equal, formats.quantize(x, name), want)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8_e5m2", "fp8_tensor"])
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


# --- hand-worked ----------------------------------------------------------------------------------


def padded(*heads, length=16):
    return np.array([[*head, *[0.0] * (length - len(head))] for head in heads], F32)


def test_nvfp4_by_hand():
    # amax = 2688 = 6 * 448, so encode = decode = 1 and a scale is e4m3(block amax / 6).
    # Row 0: 2688 / 6 = 448 = 1.75 * 2^8 -> 0 1111 110 = 0x7e.  2688 / 448 = 6 -> 7;  1344 / 448 = 3 -> 5.
    # Row 1: 10 / 6 = 1.667, E4M3 has 1.625 and 1.75 -> 1.625 = 0 0111 101 = 0x3d.
    #   10 / 1.625 = 6.15 -> 6 (7);  5 / 1.625 = 3.08 -> 3 (5);  2 / 1.625 = 1.23 -> 1 (2);
    #   -1 / 1.625 = -0.615 -> -0.5 (8 + 1);  0.4 / 1.625 = 0.246 -> 0.
    x = padded([2688, 1344], [10, 5, 2, -1, 0.4], [0])
    q = formats.quantize(x, "nvfp4")
    assert q.global_amax == 2688
    np.testing.assert_array_equal(q.scales, [[0x7E], [0x3D], [0]])
    # Low nibble first: 7 + 16 * 5 = 0x57;  2 + 16 * 9 = 0x92.
    np.testing.assert_array_equal(q.codes[:, :3], [[0x57, 0, 0], [0x57, 0x92, 0], [0, 0, 0]])
    want = padded([2688, 1344], [6 * 1.625, 3 * 1.625, 1.625, -0.5 * 1.625], [0])
    np.testing.assert_array_equal(formats.dequantize(q), want)


def test_four_over_six_by_hand():
    # amax = 1536 = 6 * 256, so encode = decode = 1.
    # Row 0: 6: scale 256, 4: scale 384: both represent 1536 without error, the tie keeps 6: code 7, 256 = 0x78.
    # Row 1: 6: scale e4m3(1.667) = 1.625: 10 -> 6 * 1.625 = 9.75 (error 0.0625), 7.5 / 1.625 = 4.6 -> 4 * 1.625 = 6.5
    #   (error 1).  4: scale 1.5 * 1.667 = 2.5 = 0 1000 010 = 0x42: 10 = 4 * 2.5 and 7.5 = 3 * 2.5, no error.
    #   So 4: codes 6 and 5.
    # Row 2: 9.75 = 6 * 1.625, 0.8125 = 0.5 * 1.625: 6 has no error;  4: scale e4m3(2.4375) = 2.5 (tie to even of 2.25
    #   and 2.5 is at 2.375, above): 9.75 -> 4 * 2.5 = 10. So 6: scale 0x3d, codes 7 and 1.
    x = padded([1536], [10, 7.5], [9.75, 0.8125])
    q = formats.quantize(x, "nvfp4_46")
    np.testing.assert_array_equal(q.scales, [[0x78], [0x42], [0x3D]])
    np.testing.assert_array_equal(q.codes[:, 0], [7, 0x56, 0x17])
    np.testing.assert_array_equal(formats.dequantize(q), x)


E8M0_BY_HAND = {
    # E2M1: emax 2, so floor is floor(log2 a) - 2; rceil goes up above 6, even at 7 (1.75 rounds to 2).
    "e2m1": {
        "amax": [4.0, 6.0, 6.5, 7.0, 8.0, 0.75],
        "floor": [0, 0, 0, 0, 1, -3],
        "rceil": [0, 0, 1, 1, 1, -3],
        "even": [0, 0, 0, 1, 1, -3],
        "ceil": [0, 1, 1, 1, 1, -2],
    },
    # E4M3: emax 8; rceil goes up above 448 = 1.75 * 256, even at 1.9375 * 256 = 496.
    "e4m3": {
        "amax": [256.0, 448.0, 480.0, 496.0],
        "floor": [0, 0, 0, 0],
        "rceil": [0, 0, 1, 1],
        "even": [0, 0, 0, 1],
        "ceil": [0, 1, 1, 1],
    },
    # E5M2: emax 15; rceil goes up above 57344 = 1.75 * 32768, even at 1.875 * 32768 = 61440.
    "e5m2": {
        "amax": [57344.0, 61439.0, 61440.0],
        "floor": [0, 0, 0],
        "rceil": [0, 1, 1],
        "even": [0, 0, 1],
        "ceil": [1, 1, 1],
    },
}


@pytest.mark.parametrize("name", E8M0_BY_HAND)
def test_e8m0_rules_by_hand(name):
    table = E8M0_BY_HAND[name]
    for rule in MX_RULES:
        found = elements.e8m0_exponent(np.array(table["amax"], F32), ELEMENTS[name], rule)
        np.testing.assert_array_equal(found, table[rule], err_msg=rule)


def test_default_rule_is_rceil_and_never_clips():
    for name, element in MX.items():
        q = formats.quantize(STACK, name)
        assert q.rule == "rceil"
        block_amax = np.abs(STACK.astype(np.float64)).reshape(*STACK.shape[:-1], -1, 32).max(-1)
        room = LARGEST[element] * np.ldexp(1.0, np.asarray(q.scales).astype(int) - 127)
        assert (block_amax <= room).all()


def test_smallest_e8m0_scale_is_not_flushed():
    # Byte 0 is 2^-127, a float32 subnormal; 6 * 2^-127 is not.
    one_block = jnp.full((1, 16), 0x77, jnp.uint8)  # 32 codes of 6
    for scale, exponent in ((0, -127), (1, -126), (127, 0), (251, 124)):
        scales = jnp.full((1, 1), scale, jnp.uint8)
        q = formats.BlockScaled(one_block, scales, None, "mxfp4", "rceil")
        assert (np.asarray(formats.dequantize(q)) == 6 * 2.0**exponent).all()


# --- zeros, underflow, NaN ------------------------------------------------------------------------


@pytest.mark.parametrize("name", formats.FORMATS)
def test_zero_is_zero(name):
    q = formats.quantize(np.zeros_like(STACK), name)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(q))
    np.testing.assert_array_equal(formats.dequantize(q), np.zeros_like(STACK))


def test_nvfp4_underflow_is_zero():
    # The E4M3 scale of a block is block_amax / amax * 448; its smallest nonzero value is 2^-9, the midpoint 2^-10.
    # Row 1: 448 * 2^-19 = 1.75 * 2^-11 < 2^-10 -> 0.  Row 2: 448 * 2^-18 = 1.75 * 2^-10 -> 2^-9 (1.75 rounds to 2).
    x = padded([1.0], [2.0**-19], [2.0**-18])
    q = formats.quantize(x, "nvfp4")
    np.testing.assert_array_equal(q.scales[:, 0], [0x7E, 0, 1])
    np.testing.assert_array_equal(q.codes[:, 0], [7, 0, 7])
    assert formats.dequantize(q)[1, 0] == 0
    # An amax below 2688 * 2^-126 (3e-35) has a subnormal global scale: the whole tensor is zero.
    for amax in (3e-35, 1e-37, 1e-41):
        q = formats.quantize(padded([amax, amax / 2], [0], [amax]), "nvfp4")
        assert not np.asarray(q.scales).any()
        np.testing.assert_array_equal(formats.dequantize(q), np.zeros((3, 16)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_non_finite_block_becomes_nan_and_no_other_block_sees_it(name, bad):
    # From 4096 elements on, XLA's CPU maximum may drop a NaN: STACK has more.
    x = np.random.default_rng(1).standard_normal(STACK.shape).astype(F32)
    x[21, 5, 40] = 0.0
    clean = formats.quantize(x, name)
    x[21, 5, 40] = bad
    q = formats.quantize(x, name)
    block = formats.FORMATS[name].block
    hit = np.zeros(x.shape, bool)
    if name == "fp8_tensor":
        hit[21] = True
    elif name == "fp8_channel":
        hit[21, 5] = True
    else:
        first = 40 // block * block
        rows = slice(0, 16) if name == "nvfp4_2d" else 5
        hit[21, rows, first : first + block] = True
    value = np.asarray(formats.dequantize(q))
    np.testing.assert_array_equal(np.isnan(value), hit)
    assert not logical_codes(q)[hit].any()
    clean_value = np.asarray(formats.dequantize(clean))
    np.testing.assert_array_equal(value[~hit], clean_value[~hit])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_all_nan_stays_nan(name):
    q = formats.quantize(np.full_like(STACK, np.nan), name)
    assert np.isnan(formats.dequantize(q)).all()


def test_nan_is_kept_without_the_flag_that_the_other_tests_run_under():
    # With XLA's default flags, the maximum of 4096 or more float32 numbers drops a NaN on CPU.
    program = """
import jax.numpy as jnp
from pallas_kernels import formats
x = jnp.ones((64, 128)).at[3, 5].set(jnp.nan)
for name, count in (("nvfp4", 16), ("fp8_channel", 128), ("fp8_tensor", 64 * 128)):
    assert jnp.isnan(formats.dequantize(formats.quantize(x, name))).sum() == count, name
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule", "rmse"),
    [
        ("nvfp4", None, 0.0943),
        ("nvfp4_2d", None, 0.1124),
        ("nvfp4_46", None, 0.0868),
        ("mxfp4", "floor", 0.1147),
        ("mxfp4", "rceil", 0.1154),
        ("mxfp4", "even", 0.1118),
        ("mxfp4", "ceil", 0.1431),
    ],
)
def test_error_on_gaussian_data(name, rule, rmse):
    # The values of other implementations on 8192 normal numbers; 3 % for other numbers from the same distribution.
    shape = (64, 128) if name in NVFP4 else STACK.shape  # 8192 under one global scale, as there
    x = np.random.default_rng(2).standard_normal(shape).astype(F32)
    error = np.asarray(formats.dequantize(formats.quantize(x, name, rule=rule))) - x
    assert np.sqrt((error**2).mean() / (x**2).mean()) == pytest.approx(rmse, rel=0.03)


def test_fp8_error_on_gaussian_data():
    # A mantissa of m bits rounds within 2^-(m+1), uniformly in binades: a relative RMSE of about 0.42 * 2^-m / sqrt(3)
    # to 2^-m / sqrt(12) for m = 3 (0.026 to 0.036), twice that for m = 2; subnormals add little.
    x = np.random.default_rng(2).standard_normal(STACK.shape).astype(F32)
    for name, limit in (("mxfp8_e4m3", 0.036), ("mxfp8_e5m2", 0.072), ("fp8_channel", 0.036)):
        error = np.asarray(formats.dequantize(formats.quantize(x, name))) - x
        relative = np.sqrt((error**2).mean() / (x**2).mean())
        assert limit / 2 < relative < limit


def test_2d_tiles_are_transpose_consistent():
    x = np.random.default_rng(3).standard_normal(STACK.shape).astype(F32)
    tiles = x.reshape(-1, 16, 4, 16)
    turned = formats.quantize(np.swapaxes(tiles, 1, 3).reshape(x.shape), "nvfp4_2d")
    straight = formats.quantize(x, "nvfp4_2d")
    want = np.swapaxes(logical_codes(straight).reshape(tiles.shape), 1, 3).reshape(x.shape)
    np.testing.assert_array_equal(logical_codes(turned), want)
    # Stored once per row: 16 equal rows of scales.
    np.testing.assert_array_equal(straight.scales, straight.scales[:, :1].repeat(16, axis=1))


def test_four_over_six_uses_both():
    x = np.random.default_rng(4).standard_normal((64, 128)).astype(F32)
    q = formats.quantize(x, "nvfp4_46")
    four = (logical_codes(q).reshape(64, 8, 16) & 7).max(-1) < 7
    assert 0.2 < four.mean() < 0.8


def test_four_over_six_keeps_a_block_that_six_would_lose():
    # amax = 1536: encode = decode = 1. A block of 0.005: scale 0.005 / 6 = 2^-10.2 rounds to 0 for 6, but
    # 1.5 * 0.00083 = 2^-9.64 to 2^-9 for 4, and 0.005 * 2^9 = 2.56 -> 3.
    q = formats.quantize(padded([1536], [0.005], [0]), "nvfp4_46")
    np.testing.assert_array_equal(q.scales[:, 0], [0x78, 1, 0])
    assert formats.dequantize(q)[1, 0] == F32(3 * 2.0**-9)


def test_per_token_scales_do_not_see_other_tokens():
    x = np.random.default_rng(5).standard_normal((64, 128)).astype(F32)
    louder = x.copy()
    louder[63] *= 300
    for axes, same in ((1, True), (0, False)):
        before = formats.dequantize(formats.quantize(x, "nvfp4", num_batch_axes=axes))
        after = formats.dequantize(formats.quantize(louder, "nvfp4", num_batch_axes=axes))
        assert np.array_equal(before[:63], after[:63]) == same


# --- the value ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codes", "scales", "amax", "bytes_"),
    [
        # [2, 3, 16, 64]: 6144 elements. 4 bits: 3072 bytes; scales per 16: 384, per 32: 192; amax: 6 float32.
        ("nvfp4", (2, 3, 16, 32), (2, 3, 16, 4), (2, 3), 3072 + 384 + 24),
        ("nvfp4_2d", (2, 3, 16, 32), (2, 3, 16, 4), (2, 3), 3072 + 384 + 24),
        ("nvfp4_46", (2, 3, 16, 32), (2, 3, 16, 4), (2, 3), 3072 + 384 + 24),
        ("mxfp4", (2, 3, 16, 32), (2, 3, 16, 2), None, 3072 + 192),
        ("mxfp8_e4m3", (2, 3, 16, 64), (2, 3, 16, 2), None, 6144 + 192),
        ("mxfp8_e5m2", (2, 3, 16, 64), (2, 3, 16, 2), None, 6144 + 192),
        ("fp8_channel", (2, 3, 16, 64), (2, 3, 16), None, 6144 + 2 * 3 * 16 * 4),
        ("fp8_tensor", (2, 3, 16, 64), (2, 3), None, 6144 + 2 * 3 * 4),
    ],
)
def test_what_is_stored(name, codes, scales, amax, bytes_):
    q = jax.eval_shape(lambda x: formats.quantize(x, name), jnp.zeros((2, 3, 16, 64)))
    assert (q.codes.shape, q.scales.shape) == (codes, scales)
    assert (q.global_amax is None) if amax is None else (q.global_amax.shape == amax)
    assert q.shape == (2, 3, 16, 64) and q.ndim == 4
    assert formats.nbytes(q) == bytes_
    assert (q.format, q.rule) == (name, formats.FORMATS[name].rules[0])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8_tensor"])
def test_batch_axes_are_independent_and_slice_alike(name):
    q = formats.quantize(STACK, name)
    one = jax.tree.map(lambda leaf: leaf[5], q)
    jax.tree.map(np.testing.assert_array_equal, one, formats.quantize(STACK[5], name))
    _, scanned = lax.scan(lambda carry, slice_: (carry, formats.dequantize(slice_)), None, q)
    np.testing.assert_array_equal(scanned, formats.dequantize(q))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8_channel", "fp8_tensor"])
@pytest.mark.parametrize("shape", [(32,), (2, 0, 32)])
def test_any_shape_comes_back(name, shape):
    back = jax.eval_shape(lambda x: formats.dequantize(formats.quantize(x, name)), jnp.zeros(shape))
    assert back.shape == shape


def test_empty_arrays_run():
    for name in ("nvfp4", "fp8_tensor"):
        assert formats.dequantize(formats.quantize(np.zeros((0, 32), F32), name)).shape == (0, 32)


# --- layout ---------------------------------------------------------------------------------------


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


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "name", "options", "message"),
    [
        ((4, 40), F32, "nvfp4", {}, r"multiple of 16, got 40 \(shape \(4, 40\)\)"),
        ((4, 48), F32, "mxfp4", {}, r"multiple of 32, got 48 \(shape \(4, 48\)\)"),
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


def test_bad_layouts_are_refused():
    with pytest.raises(ValueError, match=r"even last axis, got shape \(2, 3\)"):
        formats.pack(np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"have the shape \(2, 1, 32, 16\), got \(1, 1, 32, 16\)"):
        formats.unswizzle(np.zeros((1, 1, 32, 16), np.uint8), 129, 4)


def test_examples_in_docstrings():
    assert doctest.testmod(block_scaled).failed == 0
