"""The formats' specification in numpy and ml_dtypes, written from the definitions and not from the library, and inputs.

Everything is float32 in the order that the definitions fix, one matrix at a time.
"""

import jax
import ml_dtypes
import numpy as np

from pallas_kernels import formats

F32 = np.float32
ROWS, COLUMNS = 16, 64  # of each matrix of CASES
DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
LARGEST = {"e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
MX = {"mxfp4": "e2m1", "mxfp8_e4m3": "e4m3", "mxfp8_e5m2": "e5m2"}
NVFP4 = {"nvfp4": 448.0, "nvfp4_2d": 448.0, "nvfp4_46": 256.0, "nvfp4_46_2d": 256.0}
TILES = {"fp8_block": (128, 128), "fp8_row128": (1, 128), "int4_group": (1, 32)}
INTEGERS = {"int8_channel": 127, "int4_group": 7}
MX_RULES = ("floor", "rceil", "even", "ceil")
VARIANTS = [("nvfp4", "amax"), ("nvfp4_2d", "amax")]
VARIANTS += [(name, rule) for name in ("nvfp4_46", "nvfp4_46_2d") for rule in ("mse", "mae")]
VARIANTS += [(name, rule) for name in MX for rule in MX_RULES]
VARIANTS += [(name, "amax") for name in ("fp8_channel", "fp8_tensor", *TILES, "int8_channel")]


# --- the specification ----------------------------------------------------------------------------


def cast(x, element):
    """Codes of x, rounded to nearest even and saturated: ml_dtypes gives NaN above the range of E4M3."""
    clipped = np.clip(x.astype(F32), -LARGEST[element], LARGEST[element])
    return clipped.astype(DTYPES[element]).view(np.uint8)


def values(code, element):
    """Float32 values of codes."""
    return code.view(DTYPES[element]).astype(F32)


def expand(scale, block):
    """Each scale for each of its block's columns."""
    return np.repeat(scale, block, axis=-1)


def nvfp4_candidate(x, ideal, decode):
    """Codes, scale bytes and values in units of the global scale, in the order of operations of Transformer Engine."""
    scale = cast(ideal, "e4m3")
    step = values(scale, "e4m3") * decode
    scale = np.where(step < F32(2.0**-124), np.uint8(0), scale)
    step = np.where(scale == 0, F32(np.inf), step)
    code = cast(x * expand(F32(1) / step, 16), "e2m1")
    return code, scale, values(code, "e2m1") * expand(values(scale, "e4m3"), 16)


def spec_nvfp4(x, name, rule):
    """NVFP4 and Four Over Six."""
    bound = NVFP4[name]
    tiles = name.endswith("2d")
    amax = np.abs(x).max()
    block_amax = np.abs(x).reshape(len(x), -1, 16).max(-1)
    if tiles:
        tile_amax = np.abs(x).reshape(len(x) // 16, 16, -1, 16).max((1, 3))
        block_amax = np.repeat(tile_amax, 16, axis=0)
    live = amax >= 6 * bound * 2.0**-126  # else the global scale is subnormal: all counts as zero
    encode = F32(6 * bound) / amax if live else F32(0)
    decode = F32(1) / encode if live else F32(0)
    g = amax * (F32(1) / F32(6 * bound))
    if rule == "amax":
        code, scale, value = nvfp4_candidate(x, block_amax * (encode * (F32(1) / F32(6))), decode)
        return code, scale, value * g
    ideal = (block_amax / F32(6)) * encode
    six = nvfp4_candidate(x, ideal, decode)
    four = nvfp4_candidate(x, ideal * F32(1.5), decode)
    # Brought near 1 by a power of two, which no rounding sees: the squares of small numbers would underflow.
    shift = -np.frexp(amax)[1]
    wanted, largest = np.ldexp(x, shift), np.ldexp(amax, shift)
    errors = []
    for candidate in (four, six):
        difference = (candidate[2] * largest) / F32(6 * bound) - wanted
        error = np.abs(difference) if rule == "mae" else difference * difference
        error = error.reshape(len(x), -1, 16)
        total = np.zeros(error.shape[:2], F32)
        for element in range(16):
            total = total + error[..., element]
        if tiles:
            rows = [total[row::16] for row in range(16)]
            while len(rows) > 1:
                half = len(rows) // 2
                rows = [
                    first + second for first, second in zip(rows[:half], rows[half:], strict=True)
                ]
            total = np.repeat(rows[0], 16, axis=0)
        errors.append(total)
    use_four = errors[0] < errors[1]
    wide = expand(use_four, 16)
    code, value = np.where(wide, four[0], six[0]), np.where(wide, four[2], six[2])
    return code, np.where(use_four, four[1], six[1]), value * g


def spec_mx(x, name, rule):
    """The MX specification in float64, where every scaled value is exact."""
    element = MX[name]
    largest, mantissa_bits = LARGEST[element], {"e2m1": 1, "e4m3": 3, "e5m2": 2}[element]
    amax = np.abs(x.astype(np.float64)).reshape(len(x), -1, 32).max(-1)
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
    with np.errstate(over="ignore"):  # an amax rounded up to 2^128
        value = (values(code, element) * expand(np.ldexp(1.0, exponent), 32)).astype(F32)
    return code, (exponent + 127).astype(np.uint8), value


def spec_fp8(x, name):
    """FP8 per channel and per tensor, with reciprocals."""
    whole = name == "fp8_tensor"
    amax = np.abs(x).max(keepdims=True) if whole else np.abs(x).max(-1, keepdims=True)
    scale = amax * (F32(1) / F32(448))
    scale = np.where(scale < F32(2.0**-116), F32(0), scale)
    reciprocal = np.where(scale > 0, F32(1) / np.where(scale > 0, scale, F32(1)), F32(0))
    code = cast(x * reciprocal, "e4m3")
    return code, scale[0, 0] if whole else scale[:, 0], values(code, "e4m3") * scale


def spec_divided(x, name):
    """FP8 tiles and integers, tile by tile, with divisions; bfloat16 scales for int4."""
    rows, columns = TILES.get(name, (1, x.shape[1]))
    code, value = np.zeros(x.shape, np.uint8), np.zeros(x.shape, F32)
    scales = np.zeros((-(-len(x) // rows), -(-x.shape[1] // columns)), F32)
    for r, c in np.ndindex(*scales.shape):
        here = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
        largest = F32(INTEGERS.get(name, 448))
        scale = np.abs(x[here]).max() / largest
        if name == "int4_group":
            scale = F32(scale.astype(ml_dtypes.bfloat16))
        scale = scale if scale >= F32(2.0**-116) else F32(0)
        scaled = x[here] / (scale or F32(np.inf))
        scales[r, c] = scale
        with np.errstate(over="ignore"):  # an amax / 127 rounded up, times 127
            if name in INTEGERS:
                rounded = np.clip(np.rint(scaled), -largest, largest)
                code[here] = rounded.astype(np.int8).view(np.uint8) & (15 if "4" in name else 255)
                value[here] = rounded * scale
            else:
                code[here] = cast(scaled, "e4m3")
                value[here] = values(code[here], "e4m3") * scale
    return code, scales[:, 0] if name == "int8_channel" else scales, value


def specification(x, name, rule):
    """(codes, scales, values) of one matrix."""
    if name in NVFP4:
        return spec_nvfp4(x, name, rule)
    if name in MX:
        return spec_mx(x, name, rule)
    return spec_divided(x, name) if name in TILES or name in INTEGERS else spec_fp8(x, name)


# --- inputs ---------------------------------------------------------------------------------------


def make_cases(shape=(ROWS, COLUMNS)):
    """Named finite matrices that are meant to hurt; rows and columns are multiples of 16."""
    rows, columns = shape
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(shape)
    sign = rng.choice([-1.0, 1.0], shape)
    midpoint = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5])
    ties = rng.choice(midpoint, shape)
    ties[:, ::16] = 6.0  # every block's largest value, so that scales are exact
    powers = 2.0 ** rng.integers(-3, 4, (rows, columns // 16))
    scaled_ties = np.array(ties * np.repeat(powers, 16, axis=1), F32)
    integer_ties = rng.integers(-13, 14, shape) / 2
    integer_ties[:, ::16] = 7.0
    holes = normal.copy()
    holes[::2, 16:48] = 0.0
    outlier = normal.copy()
    outlier[3, 5] = 1e4
    subnormal = normal * 2.0**-100
    subnormal[:, 1::2] = 2.0**-127 * rng.integers(1, 8, (rows, columns // 2)) / 4
    one = np.zeros(shape)
    one[7, 33] = -0.37
    # Blocks whose scale lies halfway between two of E4M3, where the order of its operations decides.
    scale = np.arange(0x48, 0x78, dtype=np.uint8)
    halfway = rng.choice(values(scale, "e4m3") + values(scale + 1, "e4m3"), powers.shape) / 2
    scale_ties = {}
    for bound in (448, 256):
        biggest = np.array(normal / np.abs(normal).max(), F32).clip(-0.01, 0.01)
        biggest[:, ::16] = F32(0.7) / bound * halfway
        biggest[0, 0] = 0.7
        scale_ties[f"scale_ties_{bound}"] = biggest
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
        "ties_of_four_over_six": sign * ties * 256,  # amax 1536
        "ties_of_integers": integer_ties,
        "ties_of_integers_at_any_scale": integer_ties * 0.0123,
        **scale_ties,
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
    for i, exponent in enumerate(rng.uniform(-28, 36, 36)):
        cases[f"magnitude_{i}"] = rng.standard_normal(shape) * 10.0**exponent
    return {name: np.asarray(x, F32) for name, x in cases.items()}


CASES = make_cases()
STACK = np.stack(list(CASES.values()))
LARGE_CASES = make_cases((144, 208))  # two by two tiles of 128, the last ones partial


def padded(*heads, length=16):
    """Rows that begin with the heads, then zeros."""
    return np.array([[*head, *[0.0] * (length - len(head))] for head in heads], F32)


# --- comparison -----------------------------------------------------------------------------------


def flushed(x):
    """Subnormal results become zero, as XLA's CPU backend makes them; and -0 becomes 0."""
    return np.where(np.abs(x) < 2.0**-126, F32(0), x)


def logical_codes(q):
    """Codes, one a byte."""
    codes = formats.unpack(q.codes) if formats.FORMATS[q.format].element.bits == 4 else q.codes
    return np.asarray(codes)


def differences(q, value, x, name, rule):
    """How many codes, scales and dequantized values of one matrix differ from the specification."""
    code, scale, value = logical_codes(q), np.asarray(q.scales), np.asarray(value)
    want_code, want_scale, want_value = specification(x, name, rule)
    # Codes below a zero scale mean nothing; zero codes are what we promise there.
    dead = expand(want_scale == 0, 16) if name in NVFP4 else np.zeros_like(code, bool)
    magnitude = 7 if formats.FORMATS[name].element.bits == 4 else 127
    wrong_code = np.where(dead, code & magnitude, code ^ want_code) != 0
    wrong_value = flushed(value) != flushed(np.where(dead, F32(0), want_value))
    wrong_scale = scale.astype(want_scale.dtype) != want_scale
    return tuple(int(wrong.sum()) for wrong in (wrong_code, wrong_scale, wrong_value))


def assert_specified(q, value, rule, cases):
    """Asserts that no code, scale or value of a stack of cases differs."""
    found = {}
    for i, (case, x) in enumerate(cases.items()):
        one = jax.tree.map(lambda leaf: np.asarray(leaf)[i], q)  # noqa: B023
        found[case] = differences(one, np.asarray(value)[i], x, q.format, rule)
    assert {case: count for case, count in found.items() if any(count)} == {}


def assert_same(found, want):
    """Asserts that two pytrees have the same bits, NaN and bfloat16 included."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
