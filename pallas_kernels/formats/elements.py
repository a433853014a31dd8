"""The number formats of elements and scales, by bit operations: E2M1, E4M3, E5M2, E8M0 and small integers.

Floats are encoded and decoded by integer arithmetic on float32 bits, so eager, jit, vmap and every backend agree bit
for bit: there is no log2 or exp2 (inexact in XLA), no sum that a compiler could contract, and no reliance on how
float32 subnormals are treated (XLA flushes them on CPU). `dtype.astype(float8)` is not used: above its range it gives
NaN, and a cast to float4 turns NaN into -0.

References: OCP Microscaling Formats (MX) v1.0, sections 5.1 to 5.4; OCP 8-bit Floating Point, table 1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_MANTISSA_BITS = 23  # of float32
_MANTISSA = (1 << _MANTISSA_BITS) - 1
_HIDDEN_BIT = 1 << _MANTISSA_BITS
_BIAS = 127  # of float32
_EXPONENT = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
E8M0_NAN = 255
E4M3_NAN = 0x7F


@dataclasses.dataclass(frozen=True)
class Element:
    """A small float: a sign, an exponent field and a mantissa field, with subnormals.

    Attributes:
      name: as in the literature.
      bits: stored bits, sign included.
      mantissa_bits: width of the mantissa field.
      bias: a field f > 0 means 2^(f - bias).
      max_code: code of the largest finite value; encoding saturates here.
      max_value: that value.
      max_exponent: floor(log2(max_value)), the `emax` of the MX specification.
    """

    name: str
    bits: int
    mantissa_bits: int
    bias: int
    max_code: int
    max_value: float
    max_exponent: int


# fmt: off
E2M1 = Element("e2m1", bits=4, mantissa_bits=1, bias=1, max_code=0x7, max_value=6.0, max_exponent=2)
E4M3 = Element("e4m3", bits=8, mantissa_bits=3, bias=7, max_code=0x7E, max_value=448.0, max_exponent=8)
E5M2 = Element("e5m2", bits=8, mantissa_bits=2, bias=15, max_code=0x7B, max_value=57344.0, max_exponent=15)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Integer:
    """A two's complement integer, symmetric: the most negative code is never written.

    Attributes:
      name: as in the literature.
      bits: stored bits, sign included.
      max_value: largest magnitude; encoding saturates here.
    """

    name: str
    bits: int
    max_value: float


INT8 = Integer("int8", bits=8, max_value=127.0)
INT4 = Integer("int4", bits=4, max_value=7.0)

_RANDOM_BITS = 16  # of each element in stochastic rounding
_LARGEST_DROPPED = 30  # bits below a code's last, so that a sum with random bits fits into int32


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws int32 of a shape, uniform in [0, 2^16), for `encode`; two from each word of the generator, its whole cost.

    Args:
      key: a single PRNG key.
      shape: at least one axis.
    """
    word = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    low, high = word & jnp.uint32(0xFFFF), word >> _RANDOM_BITS
    both = jnp.concatenate([low, high], axis=-1)[..., : shape[-1]]
    return lax.optimization_barrier(both.astype(jnp.int32))


def encode(
    x: jax.Array,
    element: Element,
    exponent: jax.Array | int = 0,
    random: jax.Array | None = None,
) -> jax.Array:
    """Rounds x * 2^-exponent to the nearest code, ties to even, or stochastically; saturates.

    The power of two is taken off the exponent field, never multiplied, so float32-subnormal inputs and tiny scales
    round exactly too.

    Args:
      x: float32, any shape. Infinity saturates, and so does NaN (E2M1 has no code for it): callers mark non-finite
        blocks in the scale.
      element: the target format.
      exponent: int32, of x's shape up to axes of length 1.
      random: None, or `random_bits` of x's shape. Then x rounds up with the probability of its distance from the code
        below (to 2^-17 of the gap), so that its mean is x, and a value that has a code keeps it.

    Returns:
      uint8 codes of x's shape; the sign of zero is kept.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    # A subnormal is an integer times 2^-149: as a float32 of its own, that integer is normalized. Zero stays too small
    # to matter: a hidden bit at 2^-276.
    normal = (bits & _EXPONENT) > 0
    integer = lax.bitcast_convert_type((bits & _MANTISSA).astype(jnp.float32), jnp.int32)
    magnitude = jnp.where(normal, bits & _MAGNITUDE, integer)
    significand = (magnitude & _MANTISSA) | _HIDDEN_BIT
    field = (
        (magnitude >> _MANTISSA_BITS) - jnp.where(normal, 0, 149) - exponent
    )  # of the scaled x, unbounded
    smallest = 1 - element.bias + _BIAS  # exponent field of the format's smallest normal number
    dropped = _MANTISSA_BITS - element.mantissa_bits + jnp.maximum(smallest - field, 0)
    if random is None:
        dropped = jnp.minimum(dropped, _MANTISSA_BITS + 2)  # from here on everything rounds to zero
        odd = (significand >> dropped) & 1
        rounded = (significand + (1 << (dropped - 1)) - 1 + odd) >> dropped
    else:
        beyond = jnp.clip(dropped - _LARGEST_DROPPED, 0, _MANTISSA_BITS + 1)
        dropped = jnp.minimum(dropped, _LARGEST_DROPPED)
        # Uniform in (0, 2^dropped), in the middle of 2^16 intervals.
        uniform = (2 * random + 1) << (dropped - _RANDOM_BITS - 1)
        rounded = ((significand >> beyond) + uniform) >> dropped
    # A carry out of the mantissa moves to the next exponent by itself: codes are ordered like their values.
    code = rounded + (jnp.maximum(field - smallest, 0) << element.mantissa_bits)
    code = jnp.minimum(code, element.max_code)
    sign = lax.shift_right_logical(bits, 31) << (element.bits - 1)
    return (code | sign).astype(jnp.uint8)


def decode(code: jax.Array, element: Element) -> jax.Array:
    """Returns the float32 values of codes, exactly.

    Each format's fields fit into those of float16, whose subnormals are converted exactly everywhere; only the bias
    differs, by the factor 2^(15 - bias).

    Args:
      code: uint8, one code per byte (bits above the format's width must be zero).
      element: the format.

    Returns:
      float32 of code's shape; NaN and infinity where the format has them.
    """
    wide = code.astype(jnp.uint16)
    sign_bit = 1 << (element.bits - 1)
    half = (wide & (sign_bit - 1)) << (10 - element.mantissa_bits)
    half = half | (wide & sign_bit) << (16 - element.bits)
    value = lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)
    value = value * jnp.float32(2.0 ** (15 - element.bias))
    if element is E4M3:  # its NaN is the only code that is an ordinary number in float16
        value = jnp.where((code & 0x7F) == E4M3_NAN, jnp.float32(jnp.nan), value)
    return value


def encode_integer(x: jax.Array, element: Integer, random: jax.Array | None = None) -> jax.Array:
    """Rounds x to the nearest integer, ties to even, or stochastically as `encode` does; saturates.

    Args:
      x: float32. NaN has no code: callers mark non-finite blocks in the scale.
      element: the target format.
      random: None, or `random_bits` of x's shape.

    Returns:
      uint8 codes of x's shape, two's complement in the element's bits.
    """
    limit = jnp.float32(element.max_value)
    x = jnp.clip(
        x, -limit, limit
    )  # also keeps a compiler from contracting x's product with the difference
    if random is None:
        rounded = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    else:
        below = jnp.floor(x)
        uniform = (2 * random + 1).astype(jnp.float32) * jnp.float32(2.0 ** -(_RANDOM_BITS + 1))
        rounded = below + (x - below > uniform).astype(jnp.float32)
    return (rounded.astype(jnp.int32) & (2**element.bits - 1)).astype(jnp.uint8)


def decode_integer(code: jax.Array, element: Integer) -> jax.Array:
    """Returns the float32 values of two's complement codes: uint8, one per byte, bits above the width zero."""
    sign = 1 << (element.bits - 1)
    return ((code.astype(jnp.int32) ^ sign) - sign).astype(jnp.float32)


def reciprocal(divisor: float) -> jax.Array:
    """Returns 1 / divisor rounded to float32, as a constant."""
    return jnp.float32(np.float32(1) / np.float32(divisor))


def divide(x: jax.Array, divisor: float | jax.Array) -> jax.Array:
    """Returns x / divisor correctly rounded: XLA would multiply x by the reciprocal of a constant or a broadcast.

    Args:
      x: float32. What is not finite is divided by infinity.
      divisor: float32, of x's shape up to axes of length 1.
    """
    return x / jnp.where(jnp.isfinite(x), jnp.asarray(divisor, jnp.float32), jnp.float32(jnp.inf))


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2^exponent in float32 for int32 exponents from -126 to 127."""
    return lax.bitcast_convert_type((exponent + _BIAS) << _MANTISSA_BITS, jnp.float32)


def multiply_by_e8m0(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x * 2^(scale - 127), NaN where scale is 255.

    In two factors, because 2^-127 (byte 0) is a float32 subnormal, which XLA flushes to zero on CPU.

    Args:
      x: float32.
      scale: uint8 E8M0 bytes, of x's shape up to axes of length 1.

    Returns:
      float32 of x's shape; exact unless it leaves float32's normal range.
    """
    exponent = scale.astype(jnp.int32) - _BIAS
    first = exponent >> 1
    rest = jnp.where(scale == E8M0_NAN, jnp.float32(jnp.nan), power_of_two(exponent - first))
    return (x * power_of_two(first)) * rest


def e8m0_exponent(amax: jax.Array, element: Element, rule: str) -> jax.Array:
    """Finds the shared exponent of a block from its largest magnitude.

    floor(log2 amax) - emax, plus one where the mantissa of amax, in [1, 2), reaches the rule's threshold:
    `floor` never (values up to 8 clip to 6; OCP MX v1.0); `rceil` above the mantissa of the largest value, so that
    nothing clips (NVIDIA, cuBLAS, gpt-oss: ceil(log2(amax / max))); `even` where amax would round up to the next
    power of two in the element's mantissa (torchao EVEN, compressed-tensors); `ceil` above one (torchao CEIL).

    Args:
      amax: float32, finite and >= 0.
      element: format of the elements.
      rule: one of E8M0_RULES.

    Returns:
      int32 exponents from -127 to 127; a zero block gets -127 (byte 0).
    """
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    threshold = {
        "floor": _HIDDEN_BIT,
        "rceil": int((element.max_value / 2**element.max_exponent - 1) * 2**_MANTISSA_BITS) + 1,
        "even": _HIDDEN_BIT - (1 << (_MANTISSA_BITS - element.mantissa_bits - 1)),
        "ceil": 1,
    }[rule]
    up = ((bits & _MANTISSA) >= threshold).astype(jnp.int32)
    exponent = (bits >> _MANTISSA_BITS) - _BIAS - element.max_exponent + up
    return jnp.clip(exponent, -_BIAS, _BIAS)


E8M0_RULES = ("rceil", "floor", "even", "ceil")
