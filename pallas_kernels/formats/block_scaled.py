"""The BlockScaled value, and quantize and dequantize for every format.

NVFP4, in Transformer Engine's order of operations (all float32, global scale g = amax / 2688):

    encode = 2688 / amax;  decode = 1 / encode
    scale  = e4m3(block_amax * (encode * (1/6)))
    step   = scale * decode
    code   = e2m1(x * (1 / step))
    value  = (code * scale) * (amax * (1/2688))          one rounding: code * scale is exact

Four Over Six: 1536 for 2688, and of e4m3(ideal scale) and e4m3(1.5 * ideal scale) the one with the smaller sum of
squared errors in the block, the first if equal.
MX formats: scale = 2^e by `elements.e8m0_exponent`, code = element(x * 2^-e), value = code * 2^e.
FP8: scale = amax * (1/448), code = e4m3(x * (1 / scale)), value = code * scale.

Conventions, the same for all formats:
- A block with a NaN or an infinity gets a NaN scale and zero codes, so it dequantizes to NaN; other blocks, and the
  global amax, do not see it.
- A zero block has scale byte 0 and zero codes.
- A block whose step would come near float32's subnormals (NVFP4: step below 2^-124 or a global amax below 3.2e-35;
  FP8: scale below 2^-116) or whose E4M3 scale rounds to 0 counts as zero: scale 0, codes +-0.
- MX codes are exact for float32-subnormal inputs too; values below 2^-126 flush to zero where the backend flushes.
  `rceil`, `even` and `ceil` round an amax of 1.75 * 2^127 or more up to 2^128, which dequantizes to infinity.

K contraction axis (the last), N the axis before.

References: arXiv:2509.25149 (NVFP4), arXiv:2512.02010 (Four Over Six), OCP MX v1.0. The order of operations is that of
Transformer Engine's `NVFP4QuantizerRef`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.formats import elements, layout
from pallas_kernels.formats.elements import E2M1, E4M3, E5M2, E8M0_RULES, Element


@dataclasses.dataclass(frozen=True)
class Format:
    """What a format's name stands for.

    Attributes:
      element: format of the codes.
      scale: "e4m3" (below a global float32 scale), "e8m0", "channel" or "tensor" (float32).
      block: elements of the last axis that share a scale; None where the whole axis does.
      rules: allowed scale rules, the default first.
      block_rows: rows that share a scale; its bytes are repeated for each row, so that storage is as for 1.
      scale_bound: largest block scale that the global scale aims at (NVFP4 only).
    """

    element: Element
    scale: str
    block: int | None
    rules: tuple[str, ...]
    block_rows: int = 1
    scale_bound: float = E4M3.max_value


FORMATS: dict[str, Format] = {
    "nvfp4": Format(E2M1, "e4m3", 16, ("amax",)),
    "nvfp4_2d": Format(E2M1, "e4m3", 16, ("amax",), block_rows=16),
    # Four Over Six: 256 leaves room for a scale 1.5 times larger, which maps the block's largest value to 4, not 6.
    "nvfp4_46": Format(E2M1, "e4m3", 16, ("mse",), scale_bound=256.0),
    # rceil is what gpt-oss and NVIDIA's kernels use: nothing clips. `even` has the lowest error on Gaussian data.
    "mxfp4": Format(E2M1, "e8m0", 32, E8M0_RULES),
    "mxfp8_e4m3": Format(E4M3, "e8m0", 32, E8M0_RULES),
    "mxfp8_e5m2": Format(E5M2, "e8m0", 32, E8M0_RULES),
    "fp8_channel": Format(E4M3, "channel", None, ("amax",)),
    "fp8_tensor": Format(E4M3, "tensor", None, ("amax",)),
}

_LARGEST_NVFP4_ENCODE = 2.0**126  # above, its reciprocal is subnormal: the tensor counts as zero
_SMALLEST_NVFP4_STEP = 2.0**-124  # so that float32-subnormal inputs encode to 0, flushed or not
_SMALLEST_FP8_SCALE = 2.0**-116  # likewise: 2^-126 / 2^-116 is half of E4M3's smallest number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A quantized array, blocks along the last axis. A pytree; format and rule are static.

    `scan`, `vmap` and indexing of leading axes may slice all leaves alike, down to the axes that global_amax has.

    Attributes:
      codes: uint8 [..., K / 2], two 4-bit codes a byte, low nibble first; [..., K] for 8-bit formats.
      scales: uint8 [..., K / block], E4M3 or E8M0 bits (linear layout; `swizzle` for tensor cores); float32 [...]
        for fp8_channel and the leading axes for fp8_tensor.
      global_amax: float32, of the leading axes: the amax over everything else, of finite blocks (NVFP4); else None.
      format: key of FORMATS.
      rule: scale rule, one of the format's.
    """

    codes: jax.Array
    scales: jax.Array
    global_amax: jax.Array | None
    format: str = dataclasses.field(metadata={"static": True})
    rule: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        per_byte = 8 // FORMATS[self.format].element.bits
        return (*self.codes.shape[:-1], self.codes.shape[-1] * per_byte)

    @property
    def ndim(self) -> int:
        """Number of axes of the array that was quantized."""
        return self.codes.ndim


def quantize(
    x: jax.Array, format: str, *, rule: str | None = None, num_batch_axes: int | None = None
) -> BlockScaled:
    """Quantizes to the nearest codes (ties to even) with scales from block maxima.

    >>> q = quantize(jnp.array([[6.0, 3.0, 0.5, -1.0] + [0.0] * 12]), "nvfp4")
    >>> [int(code) for code in layout.unpack(q.codes)[0, :4]], int(q.scales[0, 0]), float(q.global_amax)
    ([7, 5, 1, 10], 126, 6.0)

    Args:
      x: floating point [..., K], K a multiple of the block (16 or 32); for nvfp4_2d [..., N, K] with N a multiple of
        16. Computed in float32.
      format: key of FORMATS.
      rule: scale rule; None is the format's first.
      num_batch_axes: how many leading axes have their own global scale (NVFP4, fp8_tensor). Default ndim - 2: one per
        matrix. ndim - 1 is one per row (token), independent of the batch.

    Returns:
      BlockScaled.

    Raises:
      ValueError: unknown format or rule, dtype, shape or num_batch_axes that do not fit.

    Reference: the module's docstring.
    """
    x = jnp.asarray(x)
    spec, rule = _lookup(format, rule)
    num_batch_axes = max(x.ndim - 2, 0) if num_batch_axes is None else num_batch_axes
    _check(x, format, spec, num_batch_axes)
    return _quantize(x.astype(jnp.float32), format, rule, num_batch_axes)


def dequantize(q: BlockScaled, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Returns the array of q.shape that a quantized array stands for, NaN in blocks whose scale is NaN.

    Args:
      q: quantized array.
      dtype: of the result; products are float32, cast once at the end.
    """
    return _dequantize(q.codes, q.scales, q.global_amax, q.format, jnp.dtype(dtype))


def nbytes(q: BlockScaled) -> int:
    """Returns the stored bytes of a quantized array: codes, scales and global amax."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(q))


# The barriers below make XLA compute each code and each scale once. Without them the CPU backend fuses everything into
# the consumer and computes a block's scale for every element and a code for every nibble: 7 to 10 times slower.


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(x: jax.Array, format: str, rule: str, num_batch_axes: int) -> BlockScaled:
    spec = FORMATS[format]
    if spec.scale in ("channel", "tensor"):
        axes = x.ndim - 1 if spec.scale == "channel" else num_batch_axes
        return BlockScaled(*_fp8(x, axes), None, format, rule)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // spec.block, spec.block)
    amax, finite = _block_amax(blocks, spec.block_rows)
    global_amax = None
    if spec.scale == "e8m0":
        exponent = elements.e8m0_exponent(amax, spec.element, rule)
        code = lax.optimization_barrier(elements.encode(blocks, spec.element, exponent[..., None]))
        scale, bad_scale = (exponent + 127).astype(jnp.uint8), elements.E8M0_NAN
    else:
        global_amax = _largest(amax, tuple(range(num_batch_axes, amax.ndim)))
        code, scale = _nvfp4(blocks, amax, global_amax, spec.scale_bound, rule)
        bad_scale = elements.E4M3_NAN
    code = jnp.where(finite[..., None], code, jnp.uint8(0)).reshape(x.shape)
    scale = jnp.where(finite, scale, jnp.uint8(bad_scale))
    codes = layout.pack(code) if spec.element.bits == 4 else code
    codes, scale = lax.optimization_barrier((codes, scale))
    return BlockScaled(codes, scale, global_amax, format, rule)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _dequantize(
    codes: jax.Array,
    scales: jax.Array,
    global_amax: jax.Array | None,
    format: str,
    dtype: np.dtype,
) -> jax.Array:
    spec = FORMATS[format]
    if spec.block is None:
        scale = scales.reshape(scales.shape + (1,) * (codes.ndim - scales.ndim))
        return (elements.decode(codes, spec.element) * scale).astype(dtype)

    def scaled(code):  # codes of every element, or of every second one
        blocks = code.reshape(*scales.shape, code.shape[-1] // max(scales.shape[-1], 1))
        value = elements.decode(blocks, spec.element)
        if spec.scale == "e8m0":
            value = elements.multiply_by_e8m0(value, scales[..., None])
        else:
            step = global_amax * _reciprocal(E2M1.max_value * spec.scale_bound)
            step = step.reshape(step.shape + (1,) * (value.ndim - step.ndim))
            value = (value * elements.decode(scales[..., None], E4M3)) * step
        return value.reshape(code.shape).astype(dtype)

    if spec.element.bits == 8:
        return scaled(codes)
    # Interleaved last: XLA makes that one pass over the codes.
    value = jnp.stack([scaled(codes & 15), scaled(codes >> 4)], axis=-1)
    return value.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def _nvfp4(
    blocks: jax.Array, amax: jax.Array, global_amax: jax.Array, bound: float, rule: str
) -> tuple[jax.Array, jax.Array]:
    """Returns the codes of blocks [..., B, 16] and their E4M3 scales [..., B]."""
    encode = jnp.float32(E2M1.max_value * bound) / global_amax
    usable = encode <= jnp.float32(_LARGEST_NVFP4_ENCODE)
    # XLA turns 1 / (c / amax) into amax * (1 / c), which differs for a third of all amax: a select between hides it.
    decode = 1 / jnp.where(usable, encode, jnp.float32(jnp.inf))
    encode = jnp.where(usable, encode, jnp.float32(0))
    tail = (1,) * (amax.ndim - global_amax.ndim)
    encode, decode = (g.reshape(g.shape + tail) for g in (encode, decode))
    ideal = amax * (encode * _reciprocal(E2M1.max_value))
    code, scale = _nvfp4_with_scale(blocks, ideal, decode)
    if rule == "amax":
        return code, scale
    # 4/6: the same block with its largest value at 4 instead of 6. A tie keeps 6.
    code_4, scale_4 = _nvfp4_with_scale(blocks, ideal * jnp.float32(1.5), decode)
    wanted = blocks * encode[..., None]
    four = _squared_error(wanted, code_4, scale_4) < _squared_error(wanted, code, scale)
    four = lax.optimization_barrier(four)
    return jnp.where(four[..., None], code_4, code), jnp.where(four, scale_4, scale)


def _nvfp4_with_scale(
    blocks: jax.Array, ideal: jax.Array, decode: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns codes and E4M3 scales for given unrounded block scales."""
    scale = elements.encode(ideal, E4M3)
    step = elements.decode(scale, E4M3) * decode
    usable = step >= jnp.float32(_SMALLEST_NVFP4_STEP)
    scale = jnp.where(usable, scale, jnp.uint8(0))
    # A reciprocal and a product: XLA rewrites a division of the block by its step, eagerly or not.
    reciprocal = jnp.where(usable, 1 / step, jnp.float32(0))
    scale, reciprocal = lax.optimization_barrier((scale, reciprocal))
    code = elements.encode(blocks * reciprocal[..., None], E2M1)
    return lax.optimization_barrier(code), scale


def _squared_error(wanted: jax.Array, code: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the sum of squared errors of blocks [..., 16]; wanted is in units of the global scale.

    The clip and the minimum keep a compiler from contracting a product and a sum into one rounding, and the tree fixes
    the order of the sum: near-ties must not depend on how the code was compiled.
    """
    limit = jnp.float32(np.finfo(np.float32).max)
    value = elements.decode(code, E2M1) * elements.decode(scale, E4M3)[..., None]  # exact
    error = jnp.clip(wanted, -limit, limit) - value
    error = jnp.minimum(error * error, limit)
    while error.shape[-1] > 1:
        half = error.shape[-1] // 2
        error = error[..., :half] + error[..., half:]
    return error[..., 0]


def _fp8(x: jax.Array, num_axes: int) -> tuple[jax.Array, jax.Array]:
    """Returns E4M3 codes and one float32 scale for each index of the first axes."""
    axes = tuple(range(num_axes, x.ndim))
    finite = jnp.all(jnp.isfinite(x), axis=axes)
    scale = _largest(x, axes) * _reciprocal(E4M3.max_value)
    usable = finite & (scale >= jnp.float32(_SMALLEST_FP8_SCALE))
    reciprocal = jnp.where(usable, 1 / scale, jnp.float32(0))
    tail = (1,) * (x.ndim - num_axes)
    code = elements.encode(x * reciprocal.reshape(reciprocal.shape + tail), E4M3)
    code = jnp.where(finite.reshape(finite.shape + tail), code, jnp.uint8(0))
    scale = jnp.where(usable, scale, jnp.float32(0))
    return code, jnp.where(finite, scale, jnp.float32(jnp.nan))


def _block_amax(blocks: jax.Array, block_rows: int) -> tuple[jax.Array, jax.Array]:
    """Returns amax and finiteness of blocks [..., N, B, block] as [..., N, B]; amax is 0 where not finite.

    With block_rows > 1, both are shared by that many rows.
    """
    finite = jnp.all(jnp.isfinite(blocks), axis=-1)
    amax = _largest(blocks, (blocks.ndim - 1,))
    if block_rows > 1:
        tiles = (*amax.shape[:-2], amax.shape[-2] // block_rows, block_rows, amax.shape[-1])
        finite = jnp.all(finite.reshape(tiles), axis=-2).repeat(block_rows, axis=-2)
        amax = _largest(amax.reshape(tiles), (len(tiles) - 2,)).repeat(block_rows, axis=-2)
    return jnp.where(finite, amax, jnp.float32(0)), finite


def _largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns max |x| over axes (0 if empty), compared as integers: exact for subnormals on every backend."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(jnp.max(bits, axis=axes, initial=0), jnp.float32)


def _reciprocal(divisor: float) -> jax.Array:
    """Returns 1 / divisor rounded to float32, as a constant."""
    return jnp.float32(np.float32(1) / np.float32(divisor))


def _lookup(format: str, rule: str | None) -> tuple[Format, str]:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; allowed: {', '.join(FORMATS)}")
    rules = FORMATS[format].rules
    if rule is not None and rule not in rules:
        raise ValueError(f"unknown rule {rule!r} for format {format}; allowed: {', '.join(rules)}")
    return FORMATS[format], rules[0] if rule is None else rule


def _check(x: jax.Array, format: str, spec: Format, num_batch_axes: int) -> None:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"quantize needs float32, bfloat16 or float16, got {x.dtype}")
    needed = 2 if spec.block_rows > 1 else 1
    if x.ndim < needed:
        raise ValueError(f"{format} needs an array of at least {needed} axes, got shape {x.shape}")
    if spec.block and x.shape[-1] % spec.block:
        raise ValueError(
            f"{format} needs a last axis that is a multiple of {spec.block}, got {x.shape[-1]} (shape {x.shape})"
        )
    if x.shape[-needed] % spec.block_rows:
        raise ValueError(
            f"{format} needs {spec.block_rows} x {spec.block} tiles, got {x.shape[-2]} rows (shape {x.shape})"
        )
    if not 0 <= num_batch_axes <= x.ndim - needed:
        raise ValueError(
            f"num_batch_axes must be from 0 to {x.ndim - needed} for {format} and shape {x.shape}, got {num_batch_axes}"
        )
